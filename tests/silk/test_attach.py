"""Attaching and detaching containers, in real namespaces."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from bus.messages import Container, Handle, Stage
from bus.records import Records
from services.silk.addresses import Exhausted
from services.silk.attachments import Conflict
from services.silk.namespace import NamespaceError
from tests.silk.conftest import TestCell, eventually, lease_of, reaches, sh

pytestmark = pytest.mark.kernel


def links(cell: TestCell) -> list[str]:
    return sorted(link["ifname"] for link in json.loads(cell.sh("ip", "-j", "link")) if link["ifname"].startswith("s-"))


def test_both_ends_are_as_the_original_makes_them(cell: TestCell) -> None:
    netns = cell.container()
    attachment = cell.attach("web-1", netns)
    assert attachment.encode() == {
        "address": "10.255.1.2",
        "interface": "s-010255001002",
        "mac": "aa:aa:0a:ff:01:02",
        "peer_mac": "ee:ee:0a:ff:01:02",
        "mtu": 1450,
        "gateway": "169.254.0.1",
    }
    host = json.loads(cell.sh("ip", "-j", "-d", "addr", "show", "s-010255001002"))[0]
    assert (host["address"], host["mtu"], host["ifalias"]) == ("aa:aa:0a:ff:01:02", 1450, "web-1")
    assert {"UP", "NOARP"} <= set(host["flags"])
    assert [(a["family"], a["local"], a["address"], a["scope"]) for a in host["addr_info"]] == [
        ("inet", "169.254.0.1", "10.255.1.2", "link")
    ]
    neighbour = json.loads(cell.sh("ip", "-j", "neigh", "show", "dev", "s-010255001002"))
    assert [(n["dst"], n["lladdr"], n["state"]) for n in neighbour] == [
        ("10.255.1.2", "ee:ee:0a:ff:01:02", ["PERMANENT"])
    ]
    assert cell.sh("sysctl", "-n", "net.ipv4.conf.s-010255001002.rp_filter").strip() == "1"
    assert cell.sh("sysctl", "-n", "net.ipv6.conf.s-010255001002.disable_ipv6").strip() == "1"
    assert cell.sh("sysctl", "-n", "net.ipv4.ip_forward").strip() == "1"

    inside = ("ip", "-n", netns.rpartition("/")[2])
    end = json.loads(sh(*inside, "-j", "addr", "show", "eth0"))[0]
    assert (end["address"], end["mtu"]) == ("ee:ee:0a:ff:01:02", 1450)
    assert {"UP", "NOARP"} <= set(end["flags"])
    assert [(a["family"], a["local"], a["address"], a["scope"]) for a in end["addr_info"]] == [
        ("inet", "10.255.1.2", "169.254.0.1", "link")
    ]
    routes = sh(*inside, "route").splitlines()
    assert [line.strip() for line in routes] == [
        "default via 169.254.0.1 dev eth0 src 10.255.1.2",
        "169.254.0.1 dev eth0 proto kernel scope link src 10.255.1.2",
    ]
    assert "169.254.0.1 dev eth0 lladdr aa:aa:0a:ff:01:02 PERMANENT" in sh(*inside, "neigh")
    assert reaches(cell.name, "10.255.1.2")


def test_attaching_and_detaching_again_changes_nothing(cell: TestCell) -> None:
    netns = cell.container()
    first = cell.attach("web-1", netns)
    before = cell.sh("ip", "-j", "link")
    assert cell.attach("web-1", netns) == first
    assert cell.sh("ip", "-j", "link") == before
    cell.detach("web-1")
    assert links(cell) == []
    cell.detach("web-1")
    cell.detach("nobody")


def test_a_handle_attached_elsewhere_is_refused(cell: TestCell) -> None:
    cell.attach("web-1", cell.container())
    with pytest.raises(Conflict, match="already attached elsewhere"):
        cell.attach("web-1", cell.container())
    assert links(cell) == ["s-010255001002"]


def test_an_interface_that_is_not_ours_is_refused(cell: TestCell) -> None:
    netns = cell.container()
    sh("ip", "-n", netns.rpartition("/")[2], "link", "add", "eth0", "type", "bridge")
    with pytest.raises(Conflict, match="already has an interface 'eth0'"):
        cell.attach("web-1", netns)
    assert links(cell) == []


def test_the_cells_own_namespace_is_refused(cell: TestCell) -> None:
    before = cell.sh("ip", "route")
    for path in (f"/run/netns/{cell.name}", "/proc/thread-self/ns/net"):
        with pytest.raises(Conflict, match="is the cell's own network namespace"):
            cell.attach("web-1", path, "eth9")
    assert (links(cell), cell.sh("ip", "route")) == ([], before)


@pytest.mark.parametrize("path", ["/run/netns/sbs-absent", "/etc/hostname", "/proc/self/ns/uts"])
def test_what_is_no_network_namespace_is_refused(cell: TestCell, path: str) -> None:
    with pytest.raises(NamespaceError, match=path):
        cell.attach("web-1", path)
    assert links(cell) == []


def test_a_damaged_link_is_redone_with_its_address(cell: TestCell) -> None:
    netns = cell.container()
    cell.attach("other", cell.container())
    first = cell.attach("web-1", netns)
    sh("ip", "-n", netns.rpartition("/")[2], "addr", "flush", "dev", "eth0")
    assert cell.attach("web-1", netns) == first
    assert reaches(cell.name, str(first.address))


def test_a_container_that_ended_gives_its_place_to_the_next(cell: TestCell) -> None:
    netns = cell.container()
    cell.attach("web-1", netns)
    sh("ip", "netns", "del", netns.rpartition("/")[2])
    eventually(lambda: links(cell) == [])
    assert cell.attach("web-1", cell.container()).address == IPv4Address("10.255.1.2")


def test_addresses_of_records_and_links_are_not_given_again(cell: TestCell) -> None:
    records = Records(cell.settings.containers_dir)
    recorded = Container(Handle("old"), "/gone", Stage.READY, address=IPv4Address("10.255.1.2"))
    records.put(recorded)
    assert cell.attach("web-1", cell.container()).address == IPv4Address("10.255.1.3")
    assert cell.attach("old", cell.container()).address == IPv4Address("10.255.1.2")
    cell.detach("old")
    cell.detach("web-1")
    # The record still names .2; .3 was released and so comes after what was never given.
    assert cell.attach("web-2", cell.container()).address == IPv4Address("10.255.1.4")


def test_the_released_come_last_and_a_full_subnet_says_so(cell: TestCell) -> None:
    cell.lease = replace(cell.lease, subnet=IPv4Network("10.255.1.0/29"))
    cell.take_up()
    given = [str(cell.attach(f"web-{n}", cell.container()).address) for n in range(5)]
    assert given == [f"10.255.1.{n}" for n in range(2, 7)]
    with pytest.raises(Exhausted, match=r"all 5 addresses of subnet 10\.255\.1\.0/29 are in use"):
        cell.attach("web-5", cell.container())
    for n in (3, 1, 4):
        cell.detach(f"web-{n}")
    cell.restart()
    assert [str(cell.attach(f"new-{n}", cell.container()).address) for n in range(3)] == [
        "10.255.1.5",
        "10.255.1.3",
        "10.255.1.6",
    ]


def test_a_new_subnet_is_not_taken_up_over_containers(cell: TestCell) -> None:
    cell.attach("web-1", cell.container())
    cell.lease = lease_of(9, "10.77.0.1")
    with pytest.raises(
        Conflict, match=r"1 containers .* outside its subnet 10\.255\.9\.0/24, as web-1 \(10\.255\.1\.2\)"
    ):
        cell.take_up()
    assert "10.255.1.0/16" in cell.sh("ip", "addr", "show", "silk-vtep")
    cell.detach("web-1")
    cell.take_up()
    assert "10.255.9.0/16" in cell.sh("ip", "addr", "show", "silk-vtep")
    assert cell.sh("ip", "route", "show", "type", "unreachable").split()[1] == "10.255.9.0/24"


def test_failing_half_way_leaves_nothing(cell: TestCell) -> None:
    netns = cell.container()
    error = crash(cell, "silk.attach.after-link=error", f"network.attach(Wanted(Handle('web-1'), {netns!r}, 'eth0'))")
    assert error == 1
    assert links(cell) == []
    assert "eth0" not in sh("ip", "-n", netns.rpartition("/")[2], "link")


@pytest.mark.parametrize("point", ["silk.attach.after-address", "silk.attach.after-link"])
def test_killed_while_attaching(cell: TestCell, point: str) -> None:
    netns = cell.container()
    killed(cell, point, f"network.attach(Wanted(Handle('web-1'), {netns!r}, 'eth0'))")
    assert links(cell) == ([] if point.endswith("address") else ["s-010255001002"])
    cell.restart()
    assert links(cell) == []
    assert cell.attach("web-1", netns).address == IPv4Address("10.255.1.2")
    assert reaches(cell.name, "10.255.1.2")


def test_killed_while_detaching(cell: TestCell) -> None:
    address = cell.attach("web-1", cell.container()).address
    killed(cell, "silk.detach.after-link", f"network.detach(Handle('web-1'), IPv4Address('{address}'))")
    assert links(cell) == []
    cell.restart()
    cell.detach("web-1", address)
    assert cell.attach("web-2", cell.container()).address == IPv4Address("10.255.1.3")


def killed(cell: TestCell, point: str, call: str) -> None:
    """Do `call` on the cell's network in a process that is killed at `point`."""
    assert crash(cell, f"{point}=kill", call) == -signal.SIGKILL


def crash(cell: TestCell, failpoints: str, call: str) -> int:
    """Do `call` on the cell's network in a process of its own, with failpoints; gives its exit code."""
    program = f"""
from ipaddress import IPv4Address
from pathlib import Path
from bus.messages import Handle, Lease
from services.silk.attachments import Wanted
from services.silk.network import CellNetwork
from services.silk.settings import WorkerSettings
network = CellNetwork(WorkerSettings(
    cell={cell.settings.cell!r}, underlay=IPv4Address({str(cell.settings.underlay)!r}),
    state_dir=Path({str(cell.settings.state_dir)!r}), run_dir=Path({str(cell.settings.run_dir)!r}),
))
network.take_up(Lease.decode({cell.lease.encode()!r}))
{call}
"""
    command = ["ip", "netns", "exec", cell.name, sys.executable, "-c", program]
    environment = {**os.environ, "SILKBUS_FAILPOINTS": failpoints}
    return subprocess.run(command, env=environment, timeout=60, capture_output=True, check=False).returncode


def test_links_of_others_are_left_alone_and_their_addresses_taken(cell: TestCell) -> None:
    """As the original's silk-cni makes them, while a cell is taken over."""
    other = cell.container().rpartition("/")[2]
    name = "s-010255001002"
    cell.sh("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", other)
    assert cell.attach("web-1", cell.container()).address == IPv4Address("10.255.1.3")
    cell.restart()
    cell.detach("web-1")
    assert links(cell) == [name]
    cell.lease = lease_of(9, "10.77.0.1")
    with pytest.raises(Conflict, match=rf"1 containers .* as {name} \(10\.255\.1\.2\)"):
        cell.take_up()


def test_an_address_and_a_mac_may_be_asked_for(cell: TestCell) -> None:
    wanted, mac = IPv4Address("10.255.1.77"), "02:00:00:00:00:07"
    netns = cell.container()
    attachment = cell.attach("web-1", netns, address=wanted, mac=mac)
    assert (attachment.address, attachment.encode()["peer_mac"]) == (wanted, mac)
    assert reaches(cell.name, str(wanted))
    assert cell.attach("web-1", netns, address=wanted, mac=mac) == attachment
    cell.restart()
    assert cell.attach("web-1", netns) == attachment
    for refused, text in (
        ({"address": wanted}, r"10\.255\.1\.77 is in use by web-1"),
        ({"address": IPv4Address("10.255.1.1")}, "none that containers of this cell may have"),
        ({"address": IPv4Address("10.255.2.7")}, r"its subnet is 10\.255\.1\.0/24"),
    ):
        with pytest.raises(Conflict, match=text):
            cell.attach("web-2", cell.container(), **refused)
    with pytest.raises(Conflict, match=r"already attached with address 10\.255\.1\.77, not 10\.255\.1\.78"):
        cell.attach("web-1", netns, address=IPv4Address("10.255.1.78"))
    assert links(cell) == ["s-010255001077"]
