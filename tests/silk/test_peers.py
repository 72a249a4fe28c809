"""The entries that lead to the other cells, in real namespaces: traffic, bulk, changes, and what is not ours."""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from bus.messages import CellName
from services.silk.namespace import opened
from tests.silk.conftest import TestCell, eventually, lease_of, reaches
from tests.silk.traffic import UdpStream

pytestmark = pytest.mark.kernel


def entries(cell: TestCell) -> tuple[set[str], set[str], set[str]]:
    """Routes, neighbours and forwarding entries of ours, as iproute2 reads them."""
    routes = json.loads(cell.sh("ip", "-j", "route", "show", "proto", "83"))
    neighbours = json.loads(cell.sh("ip", "-j", "neigh", "show", "dev", "silk-vtep", "nud", "permanent"))
    forwarding = json.loads(cell.sh("bridge", "-j", "fdb", "show", "dev", "silk-vtep"))
    return (
        {f"{r['dst']} via {r['gateway']} src {r['prefsrc']}" for r in routes if "gateway" in r},
        {f"{n['dst']} {n['lladdr']}" for n in neighbours},
        {f"{f['mac']} {f['dst']} {f['state']}" for f in forwarding},
    )


def expected(cell: TestCell, leases: list[object]) -> tuple[set[str], set[str], set[str]]:
    others = [lease for lease in leases if lease != cell.lease]
    own = cell.lease.subnet.network_address
    return (
        {f"{lease.subnet} via {lease.subnet.network_address} src {own}" for lease in others},
        {f"{lease.subnet.network_address} {lease.mac}" for lease in others},
        {f"{lease.mac} {lease.underlay} permanent" for lease in others},
    )


def test_250_leases_and_a_change_among_them(cell: TestCell) -> None:
    leases = [lease_of(number) for number in range(1, 251)]
    assert cell.converge(leases) == (3 * 249, 0)
    assert entries(cell) == expected(cell, leases)
    assert cell.converge(leases) == (0, 0)
    moved = replace(leases[100], underlay=IPv4Address("10.77.0.254"), cell=CellName("another"))
    leases[100] = moved
    assert cell.converge(leases) == (1, 0)
    assert entries(cell) == expected(cell, leases)
    gone = leases.pop(100)
    assert cell.converge(leases) == (3, 0)
    assert entries(cell) == expected(cell, leases)
    cell.restart()
    assert cell.converge(leases) == (0, 0), "a restart reads back what is there"
    assert cell.converge([*leases, gone]) == (3, 0)
    assert cell.converge([], delete=False) == (0, 0), "a table that is empty for want of a centre deletes nothing"
    assert entries(cell) == expected(cell, [*leases, gone])


def test_drift_is_repaired_by_the_sweep(cell: TestCell) -> None:
    leases = [lease_of(number) for number in range(1, 6)]
    cell.converge(leases)
    cell.sh("ip", "route", "del", "10.255.2.0/24")
    cell.sh("ip", "neigh", "del", "10.255.3.0", "dev", "silk-vtep")
    cell.sh("bridge", "fdb", "replace", "ee:ee:0a:ff:04:00", "dev", "silk-vtep", "dst", "10.77.0.99", "self")
    cell.sh("ip", "route", "add", "10.255.77.0/24", "via", "10.255.2.0", "dev", "silk-vtep", "proto", "83")
    assert cell.converge(leases) == (0, 0)
    assert cell.converge(leases, sweep=True) == (4, 0)
    assert entries(cell) == expected(cell, leases)


def test_what_is_not_ours_is_left_alone(cell: TestCell) -> None:
    cell.sh("ip", "route", "add", "192.0.2.0/24", "via", "10.255.2.0", "dev", "silk-vtep", "onlink")
    cell.sh("ip", "route", "add", "198.51.100.0/24", "via", "10.77.0.250", "proto", "83")
    cell.sh("ip", "neigh", "add", "10.255.200.1", "lladdr", "02:00:00:00:00:01", "dev", "silk-vtep", "nud", "permanent")
    cell.sh("bridge", "fdb", "add", "02:00:00:00:00:01", "dev", "silk-vtep", "dst", "10.77.0.77", "self", "permanent")
    cell.converge([lease_of(number) for number in range(1, 6)])
    cell.restart()
    cell.converge([], sweep=True)
    routes = cell.sh("ip", "route")
    assert "192.0.2.0/24 via 10.255.2.0" in routes
    assert "198.51.100.0/24 via 10.77.0.250" in routes
    assert "10.255.200.1 dev silk-vtep lladdr 02:00:00:00:00:01 PERMANENT" in cell.sh("ip", "neigh")
    fdb = cell.sh("bridge", "fdb", "show", "dev", "silk-vtep")
    assert "02:00:00:00:00:01 dst 10.77.0.77" in fdb
    assert "ee:ee" not in fdb


def test_what_the_originals_daemon_left_is_taken_over_and_what_is_stale_removed(cell: TestCell) -> None:
    """As contract/cell.md 5.4 has it: no protocol of ours, and no onlink."""
    for number in (2, 3, 4):
        base, mac = f"10.255.{number}.0", f"ee:ee:0a:ff:0{number}:00"
        cell.sh("ip", "route", "add", f"{base}/24", "via", base, "dev", "silk-vtep", "src", "10.255.1.0")
        cell.sh("ip", "neigh", "add", base, "lladdr", mac, "dev", "silk-vtep", "nud", "permanent")
        fdb = ("fdb", "add", mac, "dev", "silk-vtep", "dst", f"10.77.0.{number}", "self", "permanent")
        cell.sh("bridge", *fdb)
    cell.restart()
    assert cell.converge([lease_of(2), lease_of(3)]) == (3, 0), "only the stale one is touched"
    routes = cell.sh("ip", "route")
    assert "10.255.2.0/24 via 10.255.2.0 dev silk-vtep src 10.255.1.0" in routes
    assert "10.255.4.0" not in routes + cell.sh("ip", "neigh") + cell.sh("bridge", "fdb", "show", "dev", "silk-vtep")
    assert cell.converge([lease_of(2), lease_of(3)], sweep=True) == (0, 0)


def test_leases_that_would_take_our_traffic_are_not_followed(cell: TestCell) -> None:
    ours = cell.lease
    bad = [
        replace(lease_of(2), underlay=ours.underlay),
        replace(lease_of(3), subnet=ours.subnet),
        replace(lease_of(4), subnet=type(ours.subnet)("10.3.4.0/24")),
    ]
    assert cell.converge([ours, *bad, lease_of(5)]) == (3, 0)
    assert entries(cell) == expected(cell, [lease_of(5)])


def test_a_refused_entry_does_not_stop_the_others(cell: TestCell) -> None:
    broken = replace(lease_of(3), mac="01:00:5e:00:00:01")  # a forwarding entry of a multicast MAC, to a multicast
    broken = replace(broken, underlay=IPv4Address("0.0.0.0"))  # noqa: S104 (an address no entry can have)
    changed, failed = cell.converge([lease_of(2), broken, lease_of(4)])
    assert failed >= 1
    assert changed + failed == 9
    routes, _, forwarding = entries(cell)
    assert any(entry.startswith("ee:ee:0a:ff:04:00 10.77.0.4") for entry in forwarding)
    assert any(entry.startswith("10.255.4.0/24") for entry in routes)


def test_containers_of_two_cells_talk_and_their_tag_travels(make_cell: Callable[[int], TestCell]) -> None:
    first, second = make_cell(1), make_cell(2)
    for cell in (first, second):
        cell.take_up()
        cell.converge([first.lease, second.lease])
    source, target = first.container(), second.container()
    first.attach("client", source)
    address = str(second.attach("server", target).address)
    os.environ["XTABLES_LOCKFILE"] = str(first.settings.state_dir.parent / "xtables.lock")
    first.sh("iptables", "-t", "mangle", "-A", "PREROUTING", "-i", "s-+", "-j", "MARK", "--set-mark", "0x1234")
    second.sh("iptables", "-A", "FORWARD", "-i", "silk-vtep", "-m", "mark", "--mark", "0x1234/0xffff", "-j", "ACCEPT")
    second.sh("iptables", "-A", "FORWARD", "-i", "silk-vtep", "-j", "DROP")
    assert reaches(source.rpartition("/")[2], address, timeout=10)
    first.sh("iptables", "-t", "mangle", "-F")
    assert not reaches(source.rpartition("/")[2], address, timeout=1)


def test_dead_addresses_of_our_subnet_do_not_enter_the_overlay(cell: TestCell) -> None:
    attachment = cell.attach("web-1", cell.container())
    assert f"dev {attachment.encode()['interface']}" in cell.sh("ip", "route", "get", str(attachment.address))
    assert "unreachable" in cell.sh("sh", "-c", "ip route get 10.255.1.77 2>&1 || true").lower() + cell.sh(
        "ip", "route", "show", "10.255.1.0/24"
    )
    assert not reaches(cell.name, "10.255.1.77", timeout=1)


def test_a_restart_drops_no_packet(make_cell: Callable[[int], TestCell]) -> None:
    before = threading.active_count()
    first, second = make_cell(1), make_cell(2)
    leases = [first.lease, second.lease, *(lease_of(number) for number in range(3, 100))]
    for cell in (first, second):
        cell.take_up()
        cell.converge(leases)
    source, target = first.container(), second.container()
    first.attach("client", source)
    address = second.attach("server", target).address
    # The kernel lets a link pass packets a moment after it is up; what is lost till then is no restart's fault.
    eventually(lambda: reaches(source.rpartition("/")[2], str(address)))
    with opened(source) as here, opened(target) as there, UdpStream(here, there, str(address)) as stream:
        stream.wait_for(200)
        for cell in (first, second, first, second):
            cell.restart()
            assert cell.converge(leases, sweep=True) == (0, 0)
        stream.wait_for(stream.received + 200)
    assert stream.sent == stream.received
    assert threading.active_count() <= before
