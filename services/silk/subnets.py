"""The subnets of the overlay network and the MACs of the VTEPs, which follow from them (contract/cell.md 4.5)."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from itertools import islice

_VTEP_PREFIX = "ee:ee:"


def subnet_pool(overlay: IPv4Network, prefix_length: int) -> Iterator[IPv4Network]:
    """The subnets that cells may lease, ascending: all of that length but the first."""
    return islice(overlay.subnets(new_prefix=prefix_length), 1, None)


def vtep_mac(subnet: IPv4Network) -> str:
    """The MAC of the VTEP of the cell that leases `subnet`: `ee:ee:` and the subnet's base address."""
    return _VTEP_PREFIX + subnet.network_address.packed.hex(":")


def vtep_address(mac: str) -> IPv4Address | None:
    """The base address that a VTEP's MAC was derived from; None for other MACs."""
    if not mac.startswith(_VTEP_PREFIX):
        return None
    return IPv4Address(bytes.fromhex(mac.removeprefix(_VTEP_PREFIX).replace(":", "")))
