"""What follows from a cell's addresses: its VTEP's MAC (contract/cell.md 4.5), and a name where it tells none."""

from ipaddress import IPv4Address, IPv4Network

from bus.messages import CellName, cell_name

_VTEP_PREFIX = "ee:ee:"


def vtep_mac(subnet: IPv4Network) -> str:
    """The MAC of the VTEP of the cell that leases `subnet`: `ee:ee:` and the subnet's base address."""
    return _VTEP_PREFIX + subnet.network_address.packed.hex(":")


def vtep_address(mac: str) -> IPv4Address | None:
    """The base address that a VTEP's MAC was derived from; None for other MACs."""
    if not mac.startswith(_VTEP_PREFIX):
        return None
    return IPv4Address(bytes.fromhex(mac.removeprefix(_VTEP_PREFIX).replace(":", "")))


def derived_cell(underlay: IPv4Address) -> CellName:
    """The name of a cell that tells only its address, as the original's do."""
    return cell_name(f"ip-{str(underlay).replace('.', '-')}")
