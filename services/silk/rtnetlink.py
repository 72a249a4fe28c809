"""The rtnetlink requests Silk makes, as functions from plain values to messages, and what it reads back.

Layouts: rtnetlink(7), linux/if_link.h, linux/neighbour.h. Interfaces are given by their index in the namespace of the
socket that carries the message. Nothing here does any I/O.
"""

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from services.silk.netlink import CREATE, EXCLUSIVE, REPLACE, Message, attribute

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30

UP, NOARP = 0x1, 0x80
PERMANENT = 0x80
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
PROTOCOL_BOOT = 3
_ANY_PROTOCOL, _PROTOCOL_KERNEL = 0, 2
PROTOCOL_SILK = 83
"""The routing protocol number that marks routes and neighbours as ours; unassigned in linux/rtnetlink.h."""

_LINK = struct.Struct("=BBHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BBHiHBB")
_INT = struct.Struct("=I")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_LINKINFO = 1, 3, 4, 5, 18
_IFLA_IFALIAS, _IFLA_NET_NS_FD, _IFLA_EXT_MASK = 20, 28, 29
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_SKIP_STATISTICS = 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_MAIN_TABLE, _UNICAST, _UNREACHABLE, _ONLINK = 254, 1, 7, 4
_NDA_DST, _NDA_LLADDR, _NDA_PROTOCOL = 1, 2, 12
_NTF_SELF, _AF_BRIDGE = 2, 7


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_text(data: bytes) -> str:
    return data.hex(":")


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


# Links


@dataclass(frozen=True, slots=True)
class Link:
    """A link as read back. `peer` is the other end's index in the namespace where that is; `alias` "" if unset."""

    index: int
    name: str
    alias: str
    mac: str
    mtu: int
    peer: int
    flags: int


def create_veth(name: str, mac: str, peer_name: str, peer_mac: str, peer_namespace: int, mtu: int) -> Message:
    """A veth pair whose other end is born in the network namespace that `peer_namespace`, a descriptor, refers to."""
    peer = (
        _LINK.pack(0, 0, 0, 0, 0, 0)
        + attribute(_IFLA_IFNAME, _text(peer_name))
        + attribute(_IFLA_ADDRESS, mac_bytes(peer_mac))
        + attribute(_IFLA_MTU, _INT.pack(mtu))
        + attribute(_IFLA_NET_NS_FD, _INT.pack(peer_namespace))
    )
    info = attribute(_INFO_KIND, b"veth") + attribute(_INFO_DATA, attribute(_VETH_PEER, peer))
    payload = (
        _LINK.pack(0, 0, 0, 0, 0, 0)
        + attribute(_IFLA_IFNAME, _text(name))
        + attribute(_IFLA_ADDRESS, mac_bytes(mac))
        + attribute(_IFLA_MTU, _INT.pack(mtu))
        + attribute(_IFLA_LINKINFO, info)
    )
    return Message(NEWLINK, CREATE | EXCLUSIVE, payload, f"creating links {name} and {peer_name}")


def set_link(index: int, *, up: bool, noarp: bool = False) -> Message:
    change = UP | (NOARP if noarp else 0)
    flags = (UP if up else 0) | (NOARP if noarp else 0)
    return Message(NEWLINK, 0, _LINK.pack(0, 0, 0, index, flags, change), f"setting the flags of link {index}")


def set_mac(index: int, mac: str) -> Message:
    payload = _LINK.pack(0, 0, 0, index, 0, 0) + attribute(_IFLA_ADDRESS, mac_bytes(mac))
    return Message(NEWLINK, 0, payload, f"setting the MAC of link {index}")


def set_alias(index: int, alias: str) -> Message:
    payload = _LINK.pack(0, 0, 0, index, 0, 0) + attribute(_IFLA_IFALIAS, alias.encode())
    return Message(NEWLINK, 0, payload, f"setting the alias of link {index}")


def delete_link(index: int, name: str) -> Message:
    return Message(DELLINK, 0, _LINK.pack(0, 0, 0, index, 0, 0), f"deleting link {name}")


def veths() -> tuple[int, bytes, int]:
    """The dump of all veth ends, chosen by the kernel, without their counters."""
    kind = attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, b"veth"))
    return GETLINK, _LINK.pack(0, 0, 0, 0, 0, 0) + attribute(_IFLA_EXT_MASK, _INT.pack(_SKIP_STATISTICS)) + kind, 16


def all_links() -> tuple[int, bytes, int]:
    return GETLINK, _LINK.pack(0, 0, 0, 0, 0, 0) + attribute(_IFLA_EXT_MASK, _INT.pack(_SKIP_STATISTICS)), 16


def read_link(header: bytes, values: dict[int, bytes]) -> Link:
    _, _, _, index, flags, _ = _LINK.unpack(header)
    return Link(
        index=index,
        name=values[_IFLA_IFNAME].rstrip(b"\0").decode(),
        alias=values.get(_IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace"),
        mac=mac_text(values.get(_IFLA_ADDRESS, b"")),
        mtu=_INT.unpack(values[_IFLA_MTU])[0],
        peer=_INT.unpack(values.get(_IFLA_LINK, b"\0\0\0\0"))[0],
        flags=flags,
    )


# Addresses


def add_address(index: int, local: IPv4Address, peer: IPv4Address) -> Message:
    """`local` peer `peer`/32, scope link."""
    payload = (
        _ADDRESS.pack(socket.AF_INET, 32, 0, SCOPE_LINK, index)
        + attribute(_IFA_LOCAL, local.packed)
        + attribute(_IFA_ADDRESS, peer.packed)
    )
    return Message(NEWADDR, CREATE | REPLACE, payload, f"adding address {local} peer {peer} to link {index}")


def addresses() -> tuple[int, bytes, int]:
    return GETADDR, _ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0), 8


def read_address(header: bytes, values: dict[int, bytes]) -> tuple[int, IPv4Address]:
    """(index of its link, address)."""
    local = values.get(_IFA_LOCAL) or values[_IFA_ADDRESS]
    return _ADDRESS.unpack(header)[4], IPv4Address(local)


def read_prefix(header: bytes, values: dict[int, bytes]) -> tuple[int, IPv4Interface]:
    """(index of its link, address with the length of its network's prefix)."""
    _, length, _, _, index = _ADDRESS.unpack(header)
    return index, IPv4Interface((values.get(_IFA_LOCAL) or values[_IFA_ADDRESS], length))


# Routes


def _route(prefix: IPv4Network, protocol: int, scope: int, kind: int, flags: int, *values: tuple[int, bytes]) -> bytes:
    header = _ROUTE.pack(socket.AF_INET, prefix.prefixlen, 0, 0, _MAIN_TABLE, protocol, scope, kind, flags)
    destination = attribute(_RTA_DST, prefix.network_address.packed) if prefix.prefixlen else b""
    return header + destination + b"".join(attribute(name, value) for name, value in values)


def replace_route(
    prefix: IPv4Network, gateway: IPv4Address, index: int, source: IPv4Address, protocol: int, *, onlink: bool = False
) -> Message:
    payload = _route(
        prefix,
        protocol,
        SCOPE_UNIVERSE,
        _UNICAST,
        _ONLINK if onlink else 0,
        (_RTA_GATEWAY, gateway.packed),
        (_RTA_OIF, _INT.pack(index)),
        (_RTA_PREFSRC, source.packed),
    )
    return Message(NEWROUTE, CREATE | REPLACE, payload, f"setting route {prefix} via {gateway} src {source}")


def replace_unreachable(prefix: IPv4Network) -> Message:
    payload = _route(prefix, PROTOCOL_SILK, SCOPE_UNIVERSE, _UNREACHABLE, 0)
    return Message(NEWROUTE, CREATE | REPLACE, payload, f"setting route unreachable {prefix}")


def delete_unreachable(prefix: IPv4Network) -> Message:
    payload = _route(prefix, PROTOCOL_SILK, SCOPE_UNIVERSE, _UNREACHABLE, 0)
    return Message(DELROUTE, 0, payload, f"deleting route unreachable {prefix}")


def delete_route(prefix: IPv4Network, gateway: IPv4Address, index: int) -> Message:
    values = ((_RTA_GATEWAY, gateway.packed), (_RTA_OIF, _INT.pack(index)))
    payload = _route(prefix, _ANY_PROTOCOL, SCOPE_UNIVERSE, _UNICAST, 0, *values)
    return Message(DELROUTE, 0, payload, f"deleting route {prefix} via {gateway}")


def routes() -> tuple[int, bytes, int]:
    return GETROUTE, _ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0), 12


def link_route(address: IPv4Address, index: int, source: IPv4Address) -> Message:
    """The route that the kernel makes itself with the address of a container's link."""
    values = ((_RTA_OIF, _INT.pack(index)), (_RTA_PREFSRC, source.packed))
    payload = _route(IPv4Network(address), _PROTOCOL_KERNEL, SCOPE_LINK, _UNICAST, 0, *values)
    return Message(NEWROUTE, CREATE | REPLACE, payload, f"setting route {address} on link {index}")


def read_link_route(header: bytes, values: dict[int, bytes]) -> tuple[int, IPv4Address] | None:
    """(index of the link, address) of a route to one address, directly on a link."""
    _, length, _, _, table, _, _, kind, _ = _ROUTE.unpack(header)
    if length != 32 or table != _MAIN_TABLE or kind != _UNICAST or _RTA_GATEWAY in values:
        return None
    return _INT.unpack(values.get(_RTA_OIF, bytes(4)))[0], IPv4Address(values[_RTA_DST])


@dataclass(frozen=True, slots=True)
class AnyRoute:
    """A route of the main table, whoever's; `direct` if to a network that the link is on."""

    prefix: IPv4Network
    index: int
    direct: bool
    ours: bool


def read_any_route(header: bytes, values: dict[int, bytes]) -> AnyRoute | None:
    """A route, if it is in the main table."""
    _, length, _, _, table, protocol, _, kind, _ = _ROUTE.unpack(header)
    if table != _MAIN_TABLE:
        return None
    return AnyRoute(
        prefix=IPv4Network((values.get(_RTA_DST, bytes(4)), length)),
        index=_INT.unpack(values.get(_RTA_OIF, bytes(4)))[0],
        direct=kind == _UNICAST and _RTA_GATEWAY not in values,
        ours=protocol == PROTOCOL_SILK,
    )


@dataclass(frozen=True, slots=True)
class Route:
    """A route of ours in the main table. One without a gateway is unreachable; without a source, that is 0.0.0.0."""

    prefix: IPv4Network
    gateway: IPv4Address | None
    index: int
    source: IPv4Address


def read_route(header: bytes, values: dict[int, bytes], *, anybodys: bool = False) -> Route | None:
    """A route, if its protocol says that it is ours, or it may be anybody's."""
    _, length, _, _, table, protocol, _, _, _ = _ROUTE.unpack(header)
    if (protocol != PROTOCOL_SILK and not anybodys) or table != _MAIN_TABLE:
        return None
    return Route(
        prefix=IPv4Network((values.get(_RTA_DST, bytes(4)), length)),
        gateway=IPv4Address(values[_RTA_GATEWAY]) if _RTA_GATEWAY in values else None,
        index=_INT.unpack(values.get(_RTA_OIF, bytes(4)))[0],
        source=IPv4Address(values.get(_RTA_PREFSRC, bytes(4))),
    )


# Neighbours and forwarding entries


def replace_neighbour(address: IPv4Address, mac: str, index: int) -> Message:
    payload = (
        _NEIGHBOUR.pack(socket.AF_INET, 0, 0, index, PERMANENT, 0, 0)
        + attribute(_NDA_DST, address.packed)
        + attribute(_NDA_LLADDR, mac_bytes(mac))
        + attribute(_NDA_PROTOCOL, bytes([PROTOCOL_SILK]))
    )
    return Message(NEWNEIGH, CREATE | REPLACE, payload, f"setting neighbour {address} {mac} on link {index}")


def delete_neighbour(address: IPv4Address, index: int) -> Message:
    payload = _NEIGHBOUR.pack(socket.AF_INET, 0, 0, index, 0, 0, 0) + attribute(_NDA_DST, address.packed)
    return Message(DELNEIGH, 0, payload, f"deleting neighbour {address} on link {index}")


def replace_forwarding(mac: str, destination: IPv4Address, index: int) -> Message:
    payload = (
        _NEIGHBOUR.pack(_AF_BRIDGE, 0, 0, index, PERMANENT, _NTF_SELF, 0)
        + attribute(_NDA_LLADDR, mac_bytes(mac))
        + attribute(_NDA_DST, destination.packed)
    )
    return Message(NEWNEIGH, CREATE | REPLACE, payload, f"setting forwarding entry {mac} dst {destination}")


def delete_forwarding(mac: str, destination: IPv4Address, index: int) -> Message:
    """`destination` must be the entry's own: the kernel leaves an entry with another one in place."""
    payload = (
        _NEIGHBOUR.pack(_AF_BRIDGE, 0, 0, index, 0, _NTF_SELF, 0)
        + attribute(_NDA_LLADDR, mac_bytes(mac))
        + attribute(_NDA_DST, destination.packed)
    )
    return Message(DELNEIGH, 0, payload, f"deleting forwarding entry {mac} dst {destination}")


def neighbours() -> tuple[int, bytes, int]:
    return GETNEIGH, _NEIGHBOUR.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0), 12


def forwarding(index: int) -> tuple[int, bytes, int]:
    """The dump of one device's forwarding entries. The kernel takes the device from a link header here."""
    return GETNEIGH, _LINK.pack(_AF_BRIDGE, 0, 0, index, 0, 0), 12


def read_neighbour(
    header: bytes, values: dict[int, bytes], index: int, *, anybodys: bool = False
) -> tuple[IPv4Address, str] | None:
    """A permanent neighbour on link `index`, if its protocol says that it is ours, or it may be anybody's."""
    family, _, _, at, state, _, _ = _NEIGHBOUR.unpack(header)
    ours = anybodys or values.get(_NDA_PROTOCOL) == bytes([PROTOCOL_SILK])
    if family != socket.AF_INET or at != index or not state & PERMANENT or not ours:
        return None
    return IPv4Address(values[_NDA_DST]), mac_text(values.get(_NDA_LLADDR, b""))


def read_permanent(header: bytes, values: dict[int, bytes]) -> tuple[int, IPv4Address, str] | None:
    """(index of its link, address, MAC) of a permanent neighbour, whoever made it."""
    family, _, _, index, state, _, _ = _NEIGHBOUR.unpack(header)
    if family != socket.AF_INET or not state & PERMANENT:
        return None
    return index, IPv4Address(values[_NDA_DST]), mac_text(values.get(_NDA_LLADDR, b""))


def read_forwarding(header: bytes, values: dict[int, bytes], index: int) -> tuple[str, IPv4Address] | None:
    """A permanent entry (MAC, IPv4 destination) on link `index`."""
    family, _, _, at, state, _, _ = _NEIGHBOUR.unpack(header)
    destination = values.get(_NDA_DST, b"")
    if family != _AF_BRIDGE or at != index or not state & PERMANENT or len(destination) != 4:
        return None
    return mac_text(values[_NDA_LLADDR]), IPv4Address(destination)
