"""The MACs of the VTEPs, which follow from the subnets (contract/cell.md 4.5)."""

from ipaddress import IPv4Address, IPv4Network

_VTEP_PREFIX = "ee:ee:"


def vtep_mac(subnet: IPv4Network) -> str:
    """The MAC of the VTEP of the cell that leases `subnet`: `ee:ee:` and the subnet's base address."""
    return _VTEP_PREFIX + subnet.network_address.packed.hex(":")


def vtep_address(mac: str) -> IPv4Address | None:
    """The base address that a VTEP's MAC was derived from; None for other MACs."""
    if not mac.startswith(_VTEP_PREFIX):
        return None
    return IPv4Address(bytes.fromhex(mac.removeprefix(_VTEP_PREFIX).replace(":", "")))
