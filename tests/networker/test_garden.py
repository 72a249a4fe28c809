"""The Garden front door as Guardian uses it: the plugin's process, the networker's, real namespaces and mounts."""

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bus.messages import Handle
from tests.networker.cell import eventually
from tests.networker.conftest import namespace
from tests.networker.garden_cell import Garden, garden

pytestmark = pytest.mark.kernel

PROPERTIES = {
    "app_id": "app-guid-a",
    "container_workload": "app",
    "log_config": '{"guid":"app-guid-a","index":3}',
    "org_id": "o1",
    "policy_group_id": "app-guid-a",
    "ports": "8080,2222",
    "space_id": "s1",
}
RULES: list[Any] = [
    {
        "protocol": 1,
        "networks": [{"start": "10.0.0.1", "end": "10.0.0.255"}],
        "ports": [{"start": 80, "end": 90}],
        "log": True,
    },
    {"protocol": 3, "networks": [{"start": "0.0.0.0", "end": "255.255.255.255"}], "icmps": {"type": 8, "code": 0}},  # noqa: S104
    {},
]
NETIN = [{"host_port": 0, "container_port": 8080}, {"host_port": 61001, "container_port": 2222}]


@pytest.fixture(scope="module")
def shared(netns: str) -> Iterator[Garden]:
    """One networker for all tests that do not kill it."""
    with garden(netns) as guardian:
        guardian.cell.start(dns_servers="169.254.0.2")
        yield guardian


@pytest.fixture
def guardian(shared: Garden) -> Iterator[Garden]:
    with shared.borrowed():
        yield shared


def pid_of(netns: str) -> int:
    return int(Path(netns).parts[2])


def up(guardian: Garden, **inputs: Any) -> dict[str, Any]:
    return {"Pid": pid_of(guardian.cell.netns), "Properties": PROPERTIES, **inputs}


def test_a_containers_life(guardian: Garden) -> None:
    done = guardian.call("up", body=up(guardian, netout_rules=RULES, netin=NETIN))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (
        b'{"properties":{"garden.network.container-ip":"10.255.30.2","garden.network.host-ip":"255.255.255.255",'
        b'"garden.network.mapped-ports":"[{\\"HostPort\\":61000,\\"ContainerPort\\":8080},'
        b'{\\"HostPort\\":61001,\\"ContainerPort\\":2222}]","garden.network.interface":"eth0"},'
        b'"dns_servers":["169.254.0.2"],"search_domains":["pivotal.io"]}\n'
    )
    assert guardian.mounted() == ["h-1"]
    admitted = guardian.cell.neighbours.admitted["h-1"]
    assert (admitted["app"], admitted["space"], admitted["workload"]) == ("app-guid-a", "s1", "app")
    assert admitted["ports"] == [8080, 2222]
    assert [rule["protocol"] for rule in admitted["egress"]] == ["tcp", "icmp", "all"]
    assert admitted["netns"] == str(guardian.mounts / "h-1")
    assert guardian.ports() == {"h-1": [61000, 61001]}

    assert guardian.ok("net-in", body={"HostIP": "10.0.0.1", "HostPort": 0, "ContainerPort": 9000}) == {
        "host_port": 61002,
        "container_port": 9000,
    }
    forwards = guardian.cell.neighbours.admitted["h-1"]["forwards"]
    assert [(each["host_port"], each["container_port"]) for each in forwards] == [
        (61000, 8080),
        (61001, 2222),
        (61002, 9000),
    ]
    rule = {"protocol": 2, "networks": [{"start": "8.8.8.8", "end": "8.8.8.8"}], "ports": [{"start": 53, "end": 53}]}
    guardian.ok("net-out", body={"container_ip": "10.255.30.2", "netout_rule": rule})
    guardian.ok("bulk-net-out", body={"container_ip": "10.255.30.2", "netout_rules": [rule, RULES[0]]})
    opened = guardian.cell.neighbours.admitted["h-1"]["opened"]
    assert [(each["protocol"], each["ports"]) for each in opened] == [("udp", [[53, 53]]), ("tcp", [[80, 90]])]
    assert guardian.cell.agrees()

    done = guardian.call("down")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert guardian.is_clean()
    assert guardian.call("down").returncode == 0


def test_what_guardian_really_sent(guardian: Garden) -> None:
    """The recording's calls, their process ids replaced by one that is there."""
    recording = Path(__file__).parent / "data" / "guardian.jsonl"
    for line in recording.read_text().splitlines():
        call = json.loads(line)
        arguments = [guardian.plugin.name, *call["argv"][1:]]
        arguments = [f"--configFile={guardian.file}" if "configFile" in each else each for each in arguments[1:]]
        stdin = call["stdin_raw"]
        if "Pid" in stdin:
            stdin = json.dumps(json.loads(stdin) | {"Pid": pid_of(guardian.cell.netns)})
        done = guardian.run(*arguments, stdin=stdin.encode())
        assert done.returncode == 0, done
        action, handle = arguments[2], arguments[4]
        match action:
            case "up":
                assert json.loads(done.stdout)["properties"]["garden.network.container-ip"] == "10.255.30.2"
                assert guardian.mounted() == [handle]
            case "net-in":
                assert json.loads(done.stdout) == {"host_port": 5, "container_port": 6}
            case "net-out":
                assert b"netout_rule[0]: protocol: must be 0 (all)" in done.stderr
            case "down":
                assert guardian.is_clean(handle)


def test_the_namespace_as_descriptor_3(guardian: Garden) -> None:
    descriptor = os.open(guardian.cell.netns, os.O_RDONLY)
    arguments = [f"-configFile={guardian.file}", "-handle=h-1", "-action=up"]
    done = guardian.run(*arguments, stdin=b'{"properties": null} trailing', fd=descriptor)
    os.close(descriptor)
    assert (done.returncode, done.stderr) == (0, b"")
    assert guardian.mounted() == ["h-1"]
    done = guardian.run(*arguments, stdin=b"{}")
    assert done.returncode == 1
    guardian.ok("down")
    assert guardian.is_clean()


def test_up_again_gives_the_same_answer(guardian: Garden) -> None:
    first = guardian.call("up", body=up(guardian, netin=NETIN))
    assert guardian.call("up", body=up(guardian, netin=NETIN)).stdout == first.stdout
    assert guardian.mounted() == ["h-1"]
    with namespace() as other:
        assert "in another namespace" in guardian.error("up", body={"Pid": pid_of(other)})
    guardian.ok("down")
    assert guardian.is_clean()


@pytest.mark.parametrize("target", ["/attach", "/admit"])
def test_a_failed_up_leaves_nothing(guardian: Garden, target: str) -> None:
    guardian.cell.neighbours.refuse[target] = (503, "no lease yet")
    text = guardian.error("up", body=up(guardian, netin=NETIN))
    assert "no lease yet" in text
    assert "try again" in text
    assert guardian.is_clean()
    guardian.cell.neighbours.refuse.clear()
    assert guardian.ok("up", body=up(guardian, netin=NETIN))["properties"]


@pytest.mark.parametrize("failpoint", ["after-record", "after-attach", "after-admit"])
def test_killed_in_up(netns: str, failpoint: str) -> None:
    with garden(netns) as guardian:
        guardian.cell.start(failpoints=f"networker.{failpoint}=kill")
        assert "the networker at" in guardian.error("up", body=up(guardian, netin=NETIN))
        guardian.cell.start()
        eventually("the sweep took it apart", guardian.is_clean)
        guardian.ok("up", body=up(guardian, netin=NETIN))
        assert guardian.ports() == {"h-1": [61000, 61001]}
        guardian.ok("down")
        assert guardian.is_clean()


def test_a_change_outlives_a_crash(netns: str) -> None:
    with garden(netns) as guardian:
        guardian.cell.start(failpoints="networker.change.after-record=kill")
        guardian.ok("up", body=up(guardian))
        guardian.error("net-in", body={"HostPort": 0, "ContainerPort": 9000})
        guardian.cell.start()
        eventually("the enforcer hears of it", lambda: bool(guardian.cell.neighbours.admitted["h-1"]["forwards"]))
        assert guardian.ok("net-in", body={"HostPort": 0, "ContainerPort": 9001})["host_port"] == 61001


def test_a_change_that_is_refused_is_undone(guardian: Garden) -> None:
    guardian.ok("up", body=up(guardian))
    before = guardian.cell.records.get(Handle("h-1"))
    guardian.cell.neighbours.refuse["/admit"] = (500, "no room")
    assert "no room" in guardian.error("net-in", body={"HostPort": 0, "ContainerPort": 9000})
    assert "no room" in guardian.error("net-out", body={"netout_rule": {}})
    guardian.cell.neighbours.refuse.clear()
    assert guardian.ports() == {}
    eventually("it is as it was", lambda: guardian.cell.records.get(Handle("h-1")) == before)
    assert guardian.ok("net-in", body={"HostPort": 0, "ContainerPort": 9000})["host_port"] == 61000


def test_ports(guardian: Garden) -> None:
    guardian.state.write_text('{"acquired_ports": {"of-another": [61000]}}')
    answer = guardian.ok("up", "a", up(guardian, netin=[{"host_port": 0, "container_port": 1}] * 2))
    assert json.loads(answer["properties"]["garden.network.mapped-ports"]) == [
        {"HostPort": 61001, "ContainerPort": 1},
        {"HostPort": 61002, "ContainerPort": 1},
    ]
    with namespace() as other:
        body = {"Pid": pid_of(other)}
        taken = guardian.error("up", "b", body | {"netin": [{"host_port": 61001, "container_port": 2}]})
        assert "port 61001/tcp of the cell is forwarded to container a" in taken
        assert guardian.is_clean("b")
        text = guardian.error("up", "b", body | {"netin": [{"host_port": 0, "container_port": 2}] * 3})
        assert text.startswith("allocating port: acquire port: port pool exhausted")
        assert "61000-61004" in text
        assert guardian.is_clean("b")
        guardian.ok("up", "b", body | {"netin": [{"host_port": 0, "container_port": 2}] * 2})
        assert guardian.ports() == {"of-another": [61000], "a": [61001, 61002], "b": [61003, 61004]}
        guardian.ok("down", "a")
        guardian.ok("down", "of-another")
        assert guardian.ok("net-in", "b", {"HostPort": 0, "ContainerPort": 0}) == {
            "host_port": 61000,
            "container_port": 61000,
        }
        guardian.ok("down", "b")
    assert guardian.ports() == {}


def test_ports_of_many_at_once(guardian: Garden) -> None:
    guardian.configure(total_ports=40)

    def one(number: int) -> list[int]:
        answer = guardian.ok("up", f"h-{number}", up(guardian, netin=[{"host_port": 0, "container_port": 1}] * 2))
        return [each["HostPort"] for each in json.loads(answer["properties"]["garden.network.mapped-ports"])]

    with ThreadPoolExecutor(20) as pool:
        found = [port for ports in pool.map(one, range(20)) for port in ports]
    assert sorted(found) == list(range(61000, 61040))
    assert sum(map(len, guardian.ports().values())) == 40
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: guardian.ok("down", f"h-{number}"), range(20)))
    assert guardian.ports() == {}
    assert guardian.mounted() == []


def test_proxy_redirect(guardian: Garden) -> None:
    guardian.configure(proxy_redirect_cidr="10.127.0.0/16", enable_ingress_proxy_redirect=True)
    with namespace() as netns:
        guardian.ok("up", body={"Pid": pid_of(netns)})
        saved = guardian.run_inside(netns, "iptables-save", "-t", "nat")
        assert "-A OUTPUT -d 10.127.0.0/16 -p tcp -j REDIRECT --to-ports 15001" in saved
        assert "-A PREROUTING -p tcp -j REDIRECT --to-ports 15001" in saved
        guardian.ok("down")
        assert "REDIRECT" not in guardian.run_inside(netns, "iptables-save", "-t", "nat")
        guardian.configure(proxy_redirect_cidr="banana")
        assert guardian.error("up", body={"Pid": pid_of(netns)}).startswith("proxy redirect apply: do in container: ")
        assert guardian.is_clean()


def test_down_is_told_and_goes_on_when_a_neighbour_is_away(guardian: Garden) -> None:
    guardian.ok("up", body=up(guardian, netin=NETIN))
    guardian.cell.neighbours.refuse["/forget"] = (503, "starting")
    assert guardian.error("down").startswith("cni down: enforcer: starting")
    guardian.cell.neighbours.refuse.clear()
    eventually("it is gone without being asked again", lambda: guardian.cell.records.get(Handle("h-1")) is None)
    guardian.ok("down")
    assert guardian.is_clean()


def test_a_mount_without_a_record_is_taken_away(guardian: Garden) -> None:
    guardian.ok("up", body=up(guardian))
    (guardian.cell.records.folder / "h-1.json").unlink()
    guardian.ok("down")
    assert guardian.is_clean()


def test_a_cni_runtimes_garbage_collection_is_not_gardens(guardian: Garden) -> None:
    guardian.ok("up", body=up(guardian))
    assert guardian.cell.cni("ADD", "c1", config={"name": "silkbus"})[0] == 0
    config = {"name": "silkbus", "cni.dev/valid-attachments": []}
    assert guardian.cell.cni("GC", "", netns="", ifname="", config=config) == (0, {})
    assert set(guardian.cell.neighbours.attached) == {"h-1"}


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help", "x"]])
def test_a_person_at_a_prompt(guardian: Garden, arguments: list[str]) -> None:
    done = guardian.run(*arguments)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"cfnetworking: this is a plugin for Garden-runC.  Don't run it directly.\n"


def test_an_action_that_is_none(guardian: Garden) -> None:
    assert guardian.error("paint") == "unrecognized action: paint"
    assert guardian.cell.neighbours.calls == []


@pytest.mark.parametrize("action", ["net-in", "net-out", "bulk-net-out"])
def test_nothing_can_be_changed_of_what_is_not_there(guardian: Garden, action: str) -> None:
    body = {"HostPort": 0, "ContainerPort": 1, "netout_rule": {}, "netout_rules": [{}]}
    assert guardian.error(action, body=body) == "container h-1 is not attached"
    assert guardian.is_clean()


def test_no_networker(netns: str) -> None:
    with garden(netns) as guardian:
        assert "start silkbus-networker" in guardian.error("up", body=up(guardian))
        (guardian.cell.folder / "networker.log").touch()


def test_others_get_nothing(guardian: Garden) -> None:
    for path in (guardian.cell.folder, guardian.cell.run_dir, guardian.cell.socket.parent):
        path.chmod(0o755)
    guardian.file.chmod(0o644)
    guardian.cell.socket.chmod(0o666)
    done = subprocess.run(
        [guardian.plugin, f"--configFile={guardian.file}", "--action", "down", "--handle", "h-1"],
        input=b"null",
        capture_output=True,
        user="nobody",
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert guardian.cell.neighbours.calls == []


@pytest.mark.parametrize(
    ("stdin", "text"),
    [
        (b"", "EOF"),
        (b"  \n", "EOF"),
        (b"{{", "invalid character '{' looking for beginning of object key string"),
        (b'{"Pid"', "unexpected EOF"),
        (b'{"Pid": "x"}', "json: cannot unmarshal string into Go struct field UpInputs.Pid of type int"),
        (b'{"pid": 1.5}', "json: cannot unmarshal number 1.5 into Go struct field UpInputs.Pid of type int"),
        (b"[]", "json: cannot unmarshal array into Go value of type manager.UpInputs"),
        (b'{"Pid": 4194999}', "there is no network namespace at /proc/4194999/ns/net"),
        (b'{"Pid": -1}', "Pid: -1 is not a process"),
        (b"{}", "there is no network namespace at /proc/"),
        (b'{"netin": [{"host_port": 99999}]}', "netin[0]: host_port: must be in 0..65535, not 99999"),
        (b'{"Properties": {"ports": 8080}}', "ports"),
        (b'{"Properties": []}', "json: cannot unmarshal array into Go struct field UpInputs.Properties"),
        (b"\xff\xfe", "invalid character"),
        (b"\x00", "must be Unicode text without NUL"),
        (b"[" * 200000, "exceeded max depth"),
        (b"x" * ((4 << 20) + 1), "standard input is longer than 4194304 bytes"),
    ],
)
def test_junk(guardian: Garden, stdin: bytes, text: str) -> None:
    done = guardian.run(f"--configFile={guardian.file}", "--action", "up", "--handle", "h-1", stdin=stdin)
    assert (done.returncode, done.stdout) == (1, b"")
    assert text in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert guardian.is_clean()


@pytest.mark.parametrize("handle", ["../x", "..", "a/b", "x" * 300])
@pytest.mark.parametrize("action", ["up", "down"])
def test_handles_that_are_no_names(guardian: Garden, handle: str, action: str) -> None:
    assert "handle" in guardian.error(action, handle, up(guardian))
    assert guardian.cell.neighbours.calls == []
