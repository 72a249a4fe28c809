"""What can be leased of some networks."""

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.decode import Malformed
from services.silk.pool import Kind, Pool
from services.silk.subnets import vtep_address, vtep_mac

OVERLAY = IPv4Network("10.255.0.0/16")


def test_the_pool_of_the_original() -> None:
    """255 blocks, and 255 singles of the first block (contract/cell.md 4.5)."""
    pool = Pool((OVERLAY,), 24)
    blocks, singles = list(pool.subnets(Kind.BLOCK)), list(pool.subnets(Kind.SINGLE))
    assert (len(blocks), blocks[0], blocks[-1]) == (255, IPv4Network("10.255.1.0/24"), IPv4Network("10.255.255.0/24"))
    assert (len(singles), singles[0], singles[-1]) == (255, IPv4Network("10.255.0.1"), IPv4Network("10.255.0.255"))
    assert [pool.size(kind) for kind in (Kind.BLOCK, Kind.SINGLE)] == [255, 255]


def test_another_network_adds_and_moves_nothing() -> None:
    before, after = Pool((OVERLAY,), 24), Pool((OVERLAY, IPv4Network("10.100.0.0/22")), 24)
    for kind in Kind:
        assert list(after.subnets(kind))[: before.size(kind)] == list(before.subnets(kind))
    assert [str(subnet) for subnet in list(after.subnets(Kind.BLOCK))[-3:]] == [
        "10.100.1.0/24",
        "10.100.2.0/24",
        "10.100.3.0/24",
    ]


@pytest.mark.parametrize(
    ("subnet", "kind"),
    [
        ("10.255.1.0/24", Kind.BLOCK),
        ("10.255.0.0/24", None),
        ("10.255.0.9/32", Kind.SINGLE),
        ("10.255.0.0/32", None),
        ("10.255.1.9/32", None),
        ("10.255.1.0/25", None),
        ("10.254.1.0/24", None),
        ("10.254.0.0/15", None),
    ],
)
def test_what_is_of_the_pool(subnet: str, kind: Kind | None) -> None:
    assert Pool((OVERLAY,), 24).kind_of(IPv4Network(subnet)) is kind


@pytest.mark.parametrize(
    ("networks", "length", "text"),
    [
        ((), 24, "at least one network"),
        ((OVERLAY,), 16, "longer than that of 10.255.0.0/16"),
        ((OVERLAY,), 31, "at most 30"),
        ((OVERLAY, IPv4Network("10.255.4.0/22")), 24, "10.255.0.0/16 and 10.255.4.0/22 overlap"),
        ((OVERLAY, OVERLAY), 24, "overlap"),
    ],
)
def test_what_cannot_be_cut_is_refused(networks: tuple[IPv4Network, ...], length: int, text: str) -> None:
    with pytest.raises(Malformed, match=text):
        Pool(networks, length)


SUBNETS = st.builds(
    lambda base, length: IPv4Network((base >> (32 - length) << (32 - length), length)),
    st.integers(int(OVERLAY.network_address) - 2048, int(OVERLAY.network_address) + 4096),
    st.integers(20, 32),
)


@given(st.lists(SUBNETS, max_size=5))
def test_what_is_covered_is_what_overlaps(leased: list[IPv4Network]) -> None:
    """For subnets of any size, within the pool or not."""
    pool = Pool((IPv4Network("10.255.0.0/21"), IPv4Network("10.255.12.0/23")), 24)
    for kind in Kind:
        overlapping = {s for s in pool.subnets(kind) if any(s.overlaps(other) for other in leased)}
        assert {pool.subnet(kind, base) for base in pool.covered(kind, map(str, leased))} == overlapping


def test_mac_follows_from_the_subnet() -> None:
    assert vtep_mac(IPv4Network("10.255.17.0/24")) == "ee:ee:0a:ff:11:00"
    assert vtep_address("ee:ee:0a:ff:11:00") is not None
    assert str(vtep_address("ee:ee:0a:ff:11:00")) == "10.255.17.0"
    assert vtep_address("aa:aa:0a:ff:11:00") is None
