"""The order of attaching and removing, and that a failure at any step leaves nothing."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bus.messages import Handle
from tests.networker.cell import Cell, eventually
from tests.networker.conftest import namespace

pytestmark = pytest.mark.kernel


@pytest.fixture
def running(cell: Cell) -> Cell:
    cell.start()
    return cell


def test_attaching_and_removing_in_order(running: Cell) -> None:
    code, result = running.cni("ADD", config={"app": "frontend", "dns": {"nameservers": ["169.254.0.2"]}})
    assert (code, result) == (
        0,
        {
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": "s-010255030002", "mac": "aa:aa:0a:ff:1e:02"},
                {"name": "eth0", "mac": "ee:ee:0a:ff:1e:02", "sandbox": running.netns},
            ],
            "ips": [{"address": "10.255.30.2/32", "gateway": "169.254.0.1", "interface": 1}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.0.1"}],
            "dns": {"nameservers": ["169.254.0.2"]},
        },
    )
    assert running.seen() == ["/attach", "/admit"]
    assert running.agrees()
    (record,) = running.get("/containers").json()["containers"]
    assert (record["handle"], record["app"], record["stage"]) == ("c1", "frontend", "ready")
    assert running.cni("DEL") == (0, {})
    assert sorted(running.seen()) == ["/detach", "/forget"]
    assert running.is_clean()


def test_same_add_again_gives_the_same_answer(running: Cell) -> None:
    first = running.cni("ADD")
    running.seen()
    assert running.cni("ADD") == first
    assert running.seen() == []


def test_add_again_elsewhere_is_refused(running: Cell) -> None:
    running.cni("ADD")
    with namespace() as other:
        code, error = running.cni("ADD", netns=other)
    assert (code, error["code"]) == (1, 4)
    assert running.netns in error["msg"]
    assert "remove that" in error["msg"]
    assert running.cni("ADD", ifname="eth1")[1]["code"] == 4
    assert running.agrees()


def test_a_handle_whose_namespace_is_gone_is_attached_anew(running: Cell) -> None:
    with namespace() as first:
        assert running.cni("ADD", netns=first)[0] == 0
    assert running.cni("ADD")[0] == 0
    assert running.agrees()


@pytest.mark.parametrize("path", ["/proc/self/ns/net", "/nonexistent/netns", "/etc/hostname"])
def test_only_a_container_namespace_is_attached(running: Cell, path: str) -> None:
    code, error = running.cni("ADD", netns=path)
    assert (code, error["code"]) == (1, 4)
    assert path in error["msg"]
    assert running.seen() == []
    assert running.is_clean()


@pytest.mark.parametrize("netns", ["", "/nonexistent/netns"])
def test_del_of_what_is_not_there(running: Cell, netns: str) -> None:
    assert running.cni("DEL", netns=netns) == (0, {})
    assert sorted(running.seen()) == ["/detach", "/forget"]


def test_del_of_another_interface_leaves_ours(running: Cell) -> None:
    running.cni("ADD")
    assert running.cni("DEL", ifname="eth1") == (0, {})
    assert running.agrees()
    assert running.records.get(Handle("c1")) is not None


@pytest.mark.parametrize(
    ("target", "undone"),
    [
        ("/attach", ["/attach", "/detach"]),
        ("/admit", ["/attach", "/admit", "/forget", "/detach"]),
        ("/state", ["/attach", "/admit", "/forget", "/detach"]),
    ],
)
@pytest.mark.parametrize(("status", "code"), [(503, 11), (500, 999)])
def test_a_refusal_is_undone(running: Cell, target: str, undone: list[str], status: int, code: int) -> None:
    running.neighbours.refuse[target] = (status, "no lease yet")
    exit_code, error = running.cni("ADD")
    assert (exit_code, error["code"]) == (1, code)
    assert "no lease yet" in error["msg"]
    assert running.seen() == undone
    assert running.is_clean()
    running.neighbours.refuse.clear()
    assert running.cni("ADD")[0] == 0


@pytest.mark.parametrize("status", [400, 409])
@pytest.mark.parametrize(
    ("config", "code"),
    [({"runtimeConfig": {"ips": ["10.255.30.1/24"]}}, 7), ({}, 4)],
    ids=["an address that is not to be had", "an interface that is there already"],
)
def test_what_the_silk_worker_finds_to_be_the_caller_s_fault(
    running: Cell, config: dict[str, Any], code: int, status: int
) -> None:
    running.neighbours.refuse["/attach"] = (status, "that cannot be")
    exit_code, error = running.cni("ADD", config=config)
    assert (exit_code, error["code"], error["msg"]) == (1, code, "silk: that cannot be")
    assert running.is_clean()


@pytest.mark.parametrize("target", ["/attach", "/admit", "/state"])
def test_a_neighbour_that_hangs_is_undone(cell: Cell, target: str) -> None:
    cell.start(attach_timeout=0.5, admit_timeout=0.5)
    cell.neighbours.delay[target] = 3
    exit_code, error = cell.cni("ADD")
    assert (exit_code, error["code"]) == (1, 11)
    assert cell.records.get(Handle("c1")) is None
    cell.neighbours.delay.clear()


@pytest.mark.parametrize(
    "failpoint", ["after-record", "after-attach", "after-admit", "after-ready"], ids=lambda name: str(name)
)
def test_an_error_of_our_own_is_undone(cell: Cell, failpoint: str) -> None:
    cell.start(failpoints=f"networker.{failpoint}=error")
    exit_code, error = cell.cni("ADD")
    assert (exit_code, error["code"]) == (1, 999)
    assert cell.is_clean()


def test_a_record_that_cannot_be_written(running: Cell) -> None:
    running.records.folder.parent.mkdir(exist_ok=True)
    running.records.folder.write_text("in the way")
    code, error = running.cni("ADD")
    assert (code, error["code"]) == (1, 5)
    assert str(running.records.folder) in error["msg"]
    assert running.seen() == []


def test_an_unreadable_record(running: Cell) -> None:
    running.cni("ADD")
    (running.records.folder / "c1.json").write_text("{")
    code, error = running.cni("ADD")
    assert (code, error["code"]) == (1, 999)
    assert "c1.json" in error["msg"]
    assert running.cni("DEL") == (0, {})
    assert running.is_clean()


@pytest.mark.parametrize("target", ["/admit", "/state"])
def test_undo_that_fails_is_left_for_the_sweep(running: Cell, target: str) -> None:
    running.neighbours.refuse = {target: (503, "starting"), "/forget": (503, "starting")}
    assert running.cni("ADD")[1]["code"] == 11
    record = running.records.get(Handle("c1"))
    assert record is not None
    assert record.stage == "attaching"
    running.neighbours.refuse.clear()
    eventually("the sweep took it apart", running.is_clean)


@pytest.mark.parametrize("target", ["/forget", "/detach"])
def test_del_fails_and_keeps_the_record_while_a_neighbour_is_away(running: Cell, target: str) -> None:
    running.cni("ADD")
    running.neighbours.refuse[target] = (503, "starting")
    code, error = running.cni("DEL")
    assert (code, error["code"]) == (1, 11)
    assert running.records.get(Handle("c1")) is not None
    running.neighbours.refuse.clear()
    assert running.cni("DEL") == (0, {})
    assert running.is_clean()


def test_half_removed_is_not_ready(running: Cell) -> None:
    """An enforcer that starts now must not take it for one that is there, nor may an ADD be told so."""
    running.cni("ADD")
    running.neighbours.refuse["/detach"] = (503, "starting")
    assert running.cni("DEL")[1]["code"] == 11
    record = running.records.get(Handle("c1"))
    assert record is not None
    assert record.stage == "removing"
    running.neighbours.refuse.clear()
    assert running.cni("ADD")[0] == 0
    assert running.agrees()


def test_neighbours_that_do_not_run(netns: str) -> None:
    with Cell(netns, neighbours=False) as cell:
        cell.start()
        code, error = cell.cni("ADD")
        assert (code, error["code"]) == (1, 11)
        assert "silk.sock" in error["msg"]
        assert cell.cni("DEL")[1]["code"] == 11
        assert cell.cni("STATUS")[1]["code"] == 50
        assert cell.stop() == 0


def test_admitted_again_if_the_enforcer_was_restarted_meanwhile(running: Cell) -> None:
    def restart(target: str) -> None:
        if target == "/state":
            running.neighbours.before = lambda _: None
            running.neighbours.instance = "second"
            running.neighbours.admitted.clear()

    running.neighbours.before = restart
    assert running.cni("ADD")[0] == 0
    assert running.seen() == ["/attach", "/admit", "/admit"]
    assert running.neighbours.admitted["c1"]["stage"] == "ready"
    assert running.agrees()


def test_a_hundred_at_once(running: Cell) -> None:
    handles = [f"c{number}" for number in range(100)]
    with ThreadPoolExecutor(len(handles)) as pool:
        results = list(pool.map(lambda handle: running.cni("ADD", handle), handles))
    assert [code for code, _ in results] == [0] * 100
    assert len({result["ips"][0]["address"] for _, result in results}) == 100
    assert running.agrees()
    with ThreadPoolExecutor(len(handles)) as pool:
        assert list(pool.map(lambda handle: running.cni("DEL", handle), handles)) == [(0, {})] * 100
    assert running.agrees()
    assert not running.neighbours.attached


def test_one_handle_by_many_at_once(running: Cell) -> None:
    def call(number: int) -> tuple[int, dict[str, Any]]:
        return running.cni("DEL" if number % 3 == 0 else "ADD")

    with ThreadPoolExecutor(30) as pool:
        assert {code for code, _ in pool.map(call, range(30))} == {0}
    assert running.agrees()


def test_del_during_add_ends_clean(running: Cell) -> None:
    running.neighbours.delay["/admit"] = 0.5
    with ThreadPoolExecutor(1) as pool:
        add = pool.submit(running.cni, "ADD")
        eventually("the enforcer is asked", lambda: ("/admit", "c1") in running.neighbours.calls)
        assert running.cni("DEL") == (0, {})
        assert add.result()[0] == 0
    assert running.is_clean()


@pytest.fixture
def inside(running: Cell) -> Iterator[Callable[..., None]]:
    """Runs `ip` in the container, which has what was answered on ADD. Its link on the cell is `lo`, only looked at."""
    running.neighbours.interface, running.neighbours.mac = "lo", "00:00:00:00:00:00"

    def ip(*arguments: str) -> None:
        subprocess.run(["nsenter", f"--net={running.netns}", "ip", *arguments], check=True)

    ip("link", "add", "eth0", "address", "ee:ee:0a:ff:1e:02", "type", "veth", "peer", "name", "other")
    ip("link", "set", "other", "up")
    ip("address", "add", "10.255.30.2/32", "dev", "eth0")
    ip("link", "set", "eth0", "up")
    ip("route", "add", "169.254.0.1", "dev", "eth0")
    ip("route", "add", "default", "via", "169.254.0.1", "dev", "eth0")
    yield ip
    subprocess.run(["nsenter", f"--net={running.netns}", "ip", "link", "delete", "eth0"], check=False)


@pytest.mark.usefixtures("inside")
def test_check(running: Cell) -> None:
    assert running.cni("CHECK")[1]["code"] == 3
    _, result = running.cni("ADD")
    assert running.cni("CHECK", config={"prevResult": result}) == (0, {})
    other = {**result, "ips": [{"address": "10.255.30.99/32"}]}
    assert running.cni("CHECK", config={"prevResult": other})[1]["code"] == 3
    assert running.cni("CHECK", ifname="eth1")[1]["code"] == 4
    running.neighbours.refuse["/"] = (503, "no lease")
    assert running.cni("CHECK")[1]["code"] == 11


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("route", "delete", "default"), "no default route"),
        (("link", "set", "eth0", "down"), "is down"),
        (("link", "set", "eth0", "address", "ee:ee:0a:ff:1e:03"), "has the MAC address ee:ee:0a:ff:1e:03"),
        (("address", "delete", "10.255.30.2/32", "dev", "eth0"), "does not have the address 10.255.30.2"),
        (("link", "delete", "eth0"), "there is no eth0"),
    ],
)
def test_check_looks_into_the_container(
    running: Cell, inside: Callable[..., None], change: tuple[str, ...], text: str
) -> None:
    running.cni("ADD")
    assert running.cni("CHECK") == (0, {})
    inside(*change)
    code, error = running.cni("CHECK")
    assert (code, error["code"]) == (1, 3)
    assert text in error["msg"]


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(("name", "text"), [("sbn-none", "does not exist on the cell"), ("lo", "has the MAC address")])
def test_check_finds_a_lost_link(running: Cell, name: str, text: str) -> None:
    running.neighbours.interface = name
    running.neighbours.mac = "aa:aa:0a:ff:1e:02"
    running.cni("ADD")
    code, error = running.cni("CHECK")
    assert (code, error["code"]) == (1, 3)
    assert f"its link {name} {text}" in error["msg"]


def test_status(running: Cell) -> None:
    assert running.cni("STATUS", "", netns="", ifname="") == (0, {})
    running.neighbours.refuse["/"] = (503, "no lease")
    code, error = running.cni("STATUS", "", netns="", ifname="")
    assert (code, error["code"]) == (1, 50)


def test_gc_removes_what_is_not_valid_in_its_network(running: Cell) -> None:
    for handle in ("c1", "c2", "c3"):
        running.cni("ADD", handle)
    running.cni("ADD", "c4", config={"name": "other"})
    empty: dict[str, str] = {"netns": "", "ifname": ""}
    assert running.cni("GC", "", **empty)[1]["code"] == 7
    running.neighbours.refuse["/detach"] = (503, "starting")
    valid = {
        "cni.dev/valid-attachments": [{"containerID": "c2", "ifname": "eth0"}, {"containerID": "c3", "ifname": "x"}]
    }
    assert running.cni("GC", "", config=valid, **empty)[1]["code"] == 11
    running.neighbours.refuse.clear()
    assert running.cni("GC", "", config=valid, **empty) == (0, {})
    assert set(running.neighbours.attached) == {"c2", "c4"}
    assert running.agrees()


def test_add_must_be_first_in_its_chain(running: Cell) -> None:
    code, error = running.cni("ADD", config={"prevResult": {"ips": []}})
    assert (code, error["code"]) == (1, 7)
    assert "first plugin" in error["msg"]
    assert running.seen() == []


def test_garden_identity_and_metadata_are_kept(running: Cell) -> None:
    properties = {"policy_group_id": "group", "app_id": "app", "space_id": "space"}
    running.cni("ADD", config={"metadata": properties, "app": "ignored"}, args="SILKBUS_APP=ignored")
    record = running.records.get(Handle("c1"))
    assert record is not None
    assert record.app == "group"
    assert {name: record.metadata[name] for name in properties} == properties
    assert record.metadata["silkbus"]["ifname"] == "eth0"


def test_orderly_stop(running: Cell) -> None:
    running.cni("ADD")
    assert running.stop() == 0
    running.start()
    assert running.agrees()
    assert len(list(Path(running.records.folder).iterdir())) == 1
