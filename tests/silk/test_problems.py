"""What is in Silk's way on a cell is found, and said so that one knows what to do."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from services.silk import problems
from services.silk.overlay import OverlayError
from services.silk.peers import desired
from tests.silk.conftest import TestCell, lease_of, reaches

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def resolvers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 169.254.0.2\nnameserver ::1\nsearch example.org\n")
    monkeypatch.setattr(problems, "_RESOLVERS", file)
    return file


def found(cell: TestCell, leases: list[problems.Lease] | None = None) -> list[str]:
    texts = cell.run(lambda: cell.network.problems(cell.lease, leases or [cell.lease]))
    return [f"{each.name}: {each.text}" for each in texts]


def test_a_good_cell_has_none(cell: TestCell) -> None:
    leases = [lease_of(number) for number in range(1, 21)]
    cell.converge(leases)
    cell.attach("web-1", cell.container())
    assert found(cell, leases) == []


def test_what_takes_addresses_of_the_overlay(cell: TestCell, resolvers: Path) -> None:
    cell.sh("ip", "addr", "add", "10.255.9.9/32", "dev", "lo")
    cell.sh("ip", "route", "add", "10.255.64.0/24", "via", "10.77.0.250")
    cell.sh("ip", "addr", "add", "10.0.0.9/8", "dev", "eth0")
    cell.sh("ip", "route", "add", "default", "via", "10.77.0.250")
    resolvers.write_text("nameserver 10.255.0.53\n")
    texts = found(cell)
    assert len(texts) == 4
    assert texts[0].startswith("overlap: address 10.255.9.9 of lo lies in the overlay network")
    assert any("route 10.255.64.0/24 by eth0 takes traffic of the overlay network 10.255.0.0/16" in t for t in texts)
    assert any("the network 10.0.0.0/8 of eth0 contains the overlay network" in text for text in texts)
    assert any("name server 10.255.0.53" in text for text in texts)


def test_sizes_that_do_not_fit(cell: TestCell) -> None:
    cell.attach("web-1", cell.container())
    cell.sh("ip", "link", "set", "eth0", "mtu", "1400")
    (text,) = found(cell)
    assert "silk-vtep has an MTU of 1450" in text
    assert "set 'mtu' to 1350 or less, or to 0" in text
    cell.take_up()
    (text,) = found(cell)
    assert "1 containers, as web-1, were attached with an MTU of 1450, and the overlay has 1350 now" in text
    cell.settings = replace(cell.settings, mtu=1400)
    with pytest.raises(
        OverlayError, match=r"'mtu' is 1400, .* more than the MTU of eth0, 1400: set it to 1350 or less"
    ):
        cell.restart()


def test_leases_that_contradict_ours(cell: TestCell) -> None:
    twin = replace(lease_of(7), underlay=cell.lease.underlay)
    part = replace(lease_of(8), subnet=IPv4Network("10.255.1.128/25"))
    outside = replace(lease_of(9), subnet=IPv4Network("10.3.4.0/24"))
    texts = found(cell, [cell.lease, twin, part, outside])
    assert [text.partition(":")[0] for text in texts] == ["leases"] * 3
    assert "cell cell-7 has a lease of 10.255.7.0/24 with this cell's underlay address 10.77.0.1" in texts[0]
    assert "overlaps this cell's 10.255.1.0/24" in texts[1]
    assert "1 leases, as 10.3.4.0/24 of cell-9, are outside 'overlay_network' (10.255.0.0/16)" in texts[2]


def test_too_many_neighbours_for_the_kernel(cell: TestCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "gc_thresh3"
    limit.write_text("300\n")
    monkeypatch.setattr(problems, "_THRESHOLD", limit)
    near = [lease_of(number) for number in range(1, 201)]
    far = [replace(lease_of(number), underlay=IPv4Address(f"10.88.0.{number}")) for number in range(1, 201)]
    assert found(cell, [cell.lease, *far]) == []
    (text,) = found(cell, near)
    assert "200 cells are on the underlay's own network 10.77.0.0/24" in text
    assert "set net.ipv4.neigh.default.gc_thresh3 to 800 or more" in text


def test_links_and_devices_of_others(cell: TestCell) -> None:
    other = cell.container().rpartition("/")[2]
    cell.sh("ip", "link", "add", "s-010255001009", "type", "veth", "peer", "name", "eth0", "netns", other)
    options = ("id", "7", "local", "10.77.0.1", "dev", "eth0", "dstport", "4789", "gbp", "nolearning")
    cell.sh("ip", "link", "add", "theirs", "type", "vxlan", *options)
    texts = found(cell)
    assert any("1 container links, as s-010255001009, were not made by this worker" in text for text in texts)
    assert any("VXLAN device theirs (VNI 7) uses UDP port 4789, too" in text for text in texts)


def test_a_program_on_the_port_is_named(make_cell: Callable[[int], TestCell]) -> None:
    cell = make_cell(1)
    holder = cell.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    holder.bind(("0.0.0.0", 4789))  # noqa: S104 (in the cell's namespace)
    try:
        with pytest.raises(
            OverlayError, match=r"UDP port 4789 or VNI 1 is in use by a program's udp socket .*vtep_port"
        ):
            cell.take_up()
    finally:
        holder.close()
    cell.take_up()


def test_a_device_with_the_same_network_identifier_is_named(make_cell: Callable[[int], TestCell]) -> None:
    cell = make_cell(1)
    options = ("id", "1", "local", "10.77.0.1", "dev", "eth0", "dstport", "4789", "gbp", "nolearning")
    cell.sh("ip", "link", "add", "theirs", "type", "vxlan", *options)
    with pytest.raises(OverlayError, match=r"in use by the VXLAN device theirs \(VNI 1\): end that"):
        cell.take_up()


def test_an_overlay_of_several_networks(make_cell: Callable[[int], TestCell]) -> None:
    first, second = make_cell(1), make_cell(2)
    networks = (IPv4Network("10.255.0.0/16"), IPv4Network("10.222.0.0/16"))
    base = IPv4Network("10.222.5.0/24")
    second.lease = replace(second.lease, subnet=base, mac="ee:ee:0a:de:05:00")
    for cell in (first, second):
        cell.settings = replace(cell.settings, overlay_network=networks)
        cell.restart()
        wanted = desired(cell.lease, networks, [first.lease, second.lease])
        result = cell.run(lambda cell=cell, wanted=wanted: cell.network.converge(wanted, delete=True, sweep=False))  # type: ignore[misc]
        assert (result.changed, result.failed) == (3, 0)
    assert "10.222.5.0/16" in second.sh("ip", "addr", "show", "silk-vtep")
    source, target = first.container(), second.container()
    first.attach("client", source)
    address = str(second.attach("server", target).address)
    assert reaches(source.rpartition("/")[2], address, timeout=10)
    # What nobody leases leaves by no other way.
    routes = {each["dst"]: each.get("type") for each in json.loads(first.sh("ip", "-j", "route"))}
    assert (routes["10.222.0.0/16"], routes["10.222.5.0/24"]) == ("unreachable", None)
    assert found(first, [first.lease, second.lease]) == []
    before = first.sh("ip", "-o", "link", "show", "silk-vtep")
    first.restart()
    assert first.sh("ip", "-o", "link", "show", "silk-vtep") == before
