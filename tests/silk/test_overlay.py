"""The overlay device, in a real namespace: its exact form, and that it is left standing."""

import json
from collections.abc import Callable

import pytest

from services.silk.overlay import OverlayError
from tests.silk.conftest import TestCell, reaches

pytestmark = pytest.mark.kernel


def device(cell: TestCell) -> dict[str, object]:
    return json.loads(cell.sh("ip", "-j", "-d", "link", "show", "silk-vtep"))[0]


def test_device_is_as_the_original_makes_it(cell: TestCell) -> None:
    link = device(cell)
    info = link["linkinfo"]["info_data"]
    assert link["address"] == "ee:ee:0a:ff:01:00"
    assert link["mtu"] == 1450
    assert "UP" in link["flags"]
    assert link["linkinfo"]["info_kind"] == "vxlan"
    assert (info["id"], info["local"], info["link"], info["port"]) == (1, "10.77.0.1", "eth0", 4789)
    assert "gbp" in info  # true, and in newer iproute2 null; absent where it is off
    assert info["learning"] is False
    assert info["ttl"] == 0
    addresses = json.loads(cell.sh("ip", "-j", "-4", "addr", "show", "silk-vtep"))[0]["addr_info"]
    assert [(a["local"], a["prefixlen"], a["scope"]) for a in addresses] == [("10.255.1.0", 16, "link")]
    assert "10.255.0.0/16 dev silk-vtep proto kernel scope link src 10.255.1.0" in cell.sh("ip", "route")
    assert "unreachable 10.255.1.0/24 proto 83" in cell.sh("ip", "route")


def test_restart_keeps_the_very_device(cell: TestCell) -> None:
    before = device(cell)
    cell.restart()
    assert device(cell)["ifindex"] == before["ifindex"]


@pytest.mark.parametrize(
    "damage",
    [
        ["ip", "link", "set", "silk-vtep", "down"],
        ["ip", "link", "set", "silk-vtep", "mtu", "1300"],
        ["ip", "addr", "flush", "dev", "silk-vtep"],
        ["ip", "addr", "add", "10.255.9.0/16", "dev", "silk-vtep", "scope", "link"],
        ["ip", "link", "set", "silk-vtep", "address", "ee:ee:0a:ff:09:00"],
        ["ip", "link", "del", "silk-vtep"],
        ["ip", "route", "flush", "proto", "83"],
    ],
)
def test_a_damaged_device_is_mended(cell: TestCell, damage: list[str]) -> None:
    cell.sh(*damage)
    cell.restart()
    test_device_is_as_the_original_makes_it(cell)


def test_a_device_of_another_kind_is_left_alone(make_cell: Callable[[int], TestCell]) -> None:
    cell = make_cell(1)
    cell.sh("ip", "link", "add", "silk-vtep", "type", "bridge")
    with pytest.raises(OverlayError, match=r"no VXLAN device but bridge.*vtep_name"):
        cell.take_up()
    assert device(cell)["linkinfo"]["info_kind"] == "bridge"


def test_a_missing_underlay_address_is_named(make_cell: Callable[[int], TestCell]) -> None:
    cell = make_cell(1)
    cell.sh("ip", "addr", "flush", "dev", "eth0")
    with pytest.raises(OverlayError, match=r"no interface has the underlay address 10\.77\.0\.1"):
        cell.take_up()


def test_a_fenced_cell_sends_nothing_and_comes_back(make_cell: Callable[[int], TestCell]) -> None:
    first, second = make_cell(1), make_cell(2)
    leases = [first.lease, second.lease]
    for cell in (first, second):
        cell.take_up()
        cell.converge(leases)
    assert reaches(first.name, "10.255.2.0")
    first.run(first.network.fence)
    assert not reaches(first.name, "10.255.2.0")
    first.take_up()
    assert first.converge(leases)[1] == 0
    assert reaches(first.name, "10.255.2.0")
