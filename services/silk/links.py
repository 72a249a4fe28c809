"""Container links: veth pairs whose one end is born inside the container's network namespace.

The forms are those of contract/cell.md 3.2: the host's end `s-AAABBBCCCDDD` is named for the container's address, both
MACs are derived from it, neither end speaks ARP, and the host is always 169.254.0.1 to the container.

The host's end gets the container's handle as its alias with the last message of all. So a link with an alias is
complete and ours. One without is what a crash of ours left if a note says that it was being made
(`services.silk.notes`), and else somebody's, as the original's silk-cni, which names its links alike.
"""

import errno
import logging
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bus.decode import Fields
from bus.failpoints import failpoint
from bus.log import about
from bus.messages import Handle
from services.silk.bandwidth import UNLIMITED, limit_link, remove_ifbs
from services.silk.namespace import Namespace, namespace_number, write_sysctl
from services.silk.netlink import Netlink, NetlinkError
from services.silk.notes import Note
from services.silk.rtnetlink import (
    NOARP,
    PROTOCOL_BOOT,
    UP,
    Link,
    add_address,
    addresses,
    create_veth,
    delete_link,
    link_route,
    mac_text,
    neighbours,
    read_address,
    read_link,
    read_link_route,
    read_permanent,
    replace_neighbour,
    replace_route,
    routes,
    set_alias,
    set_link,
    set_mac,
    veths,
)

log = logging.getLogger(__name__)

GATEWAY = IPv4Address("169.254.0.1")
_NAME = re.compile(r"s-(\d{3})(\d{3})(\d{3})(\d{3})")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_NO_MAC = "00:00:00:00:00:00"
_EVERYWHERE = IPv4Network("0.0.0.0/0")


def host_interface(address: IPv4Address) -> str:
    """The name of the host's end: `s-` and the address's octets, three digits each."""
    return "s-" + "".join(f"{octet:03}" for octet in address.packed)


def interface_address(name: str) -> IPv4Address | None:
    """The address a host's end is named for; None for other people's interfaces."""
    match = _NAME.fullmatch(name)
    if match is None or any(int(octet) > 255 for octet in match.groups()):
        return None
    return IPv4Address(bytes(int(octet) for octet in match.groups()))


def host_mac(address: IPv4Address) -> str:
    return "aa:aa:" + mac_text(address.packed)


def container_mac(address: IPv4Address) -> str:
    return "ee:ee:" + mac_text(address.packed)


def unicast_mac(fields: Fields) -> str:
    """The field `mac`, which must be the address of one interface. Raises Malformed."""
    text = fields.text("mac").lower().replace("-", ":")
    if not _MAC.fullmatch(text) or text == _NO_MAC or int(text[:2], 16) & 1:
        raise fields.malformed("mac", f"{text!r} is not the MAC address of one interface, as 02:00:00:00:00:01")
    return text


@dataclass(frozen=True, slots=True)
class ContainerLink:
    """The host's end of a container's link. `handle` is empty while the link is not complete."""

    handle: Handle
    address: IPv4Address
    link: Link


class Links:
    """The container links in the network namespace of the thread that opened `netlink`."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    def all(self, subnet: IPv4Network | None = None) -> list[ContainerLink]:
        """Every container link, or those of one subnet, complete or not."""
        found = []
        for link in _veths(self._netlink):
            address = interface_address(link.name)
            if address is not None and (subnet is None or address in subnet):
                found.append(ContainerLink(Handle(link.alias), address, link))
        return found

    def create(self, note: Note, namespace: Namespace, mtu: int) -> int:
        """Make the link that `note` describes, all of it or nothing. Gives the namespace's number.

        Raises NetlinkError, NamespaceError or OSError.
        """
        address, interface = note.address, note.interface
        name, mac = host_interface(address), note.mac or container_mac(address)
        self._netlink.run(create_veth(name, host_mac(address), interface, mac, namespace.descriptor, mtu))
        index = socket.if_nametoindex(name)
        try:
            failpoint("silk.attach.after-link")
            _set_up(self._netlink, index, name, GATEWAY, address, mac)
            number = namespace.run(lambda: _set_up_container(interface, address))
            if note.bandwidth != UNLIMITED:
                limit_link(index, note.handle, note.bandwidth, mtu)
            write_sysctl("ipv4/ip_forward", "1")
            self._netlink.run(set_alias(index, note.handle))
        except BaseException:
            with suppress(OSError):
                self._netlink.run(delete_link(index, name))
            if note.bandwidth.egress is not None:
                with suppress(OSError):
                    remove_ifbs({link.handle for link in self.all()})
            raise
        return number

    def mend(self, hosts: Mapping[Handle, tuple[ContainerLink, str]]) -> list[str]:
        """Give the host's ends back what they must have: flags, address, neighbour, route, settings. What was mended.

        With each comes the MAC of its other end. One that cannot be mended is told of and keeps no other from it.
        Raises OSError if the kernel cannot be read.
        """
        addressed = {read_address(*each) for each in self._netlink.dump(*addresses())}
        known = {read_permanent(*each) for each in self._netlink.dump(*neighbours())}
        routed = {read_link_route(*each) for each in self._netlink.dump(*routes())}
        mended = []
        for handle, (host, mac) in hosts.items():
            link = host.link
            lacks = {
                "flags": link.flags & (UP | NOARP) != UP | NOARP,
                "MAC": link.mac != host_mac(host.address),
                "address": (link.index, GATEWAY) not in addressed,
                "neighbour": (link.index, host.address, mac) not in known,
                "route": (link.index, host.address) not in routed,
                "rp_filter": not _is_filtered(link.name),
            }
            what = ", ".join(name for name, lacking in lacks.items() if lacking)
            if not what:
                continue
            try:
                if lacks["MAC"]:
                    self._netlink.run(set_mac(link.index, host_mac(host.address)))
                _set_up(self._netlink, link.index, link.name, GATEWAY, host.address, mac)
                self._netlink.run(link_route(host.address, link.index, GATEWAY))
            except OSError as error:
                log.error("link cannot be mended", extra=about(handle=handle, interface=link.name, error=str(error)))
            else:
                mended.append(f"{what} of {link.name} ({handle})")
        return mended

    def delete(self, link: Link) -> None:
        """Delete a link, and so its other end. That it is gone already is no error."""
        try:
            self._netlink.run(delete_link(link.index, link.name))
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise


def is_attached(host: ContainerLink, namespace: Namespace, interface: str, mac: str) -> bool | None:
    """Whether the link's other end is `interface` in that namespace, with that MAC, and whole.

    False for one that is there and not whole; None when it is not there at all.
    """

    def look() -> bool | None:
        with Netlink() as netlink:
            ends = [link for link in _veths(netlink) if link.name == interface]
            if not ends or (ends[0].index, ends[0].peer) != (host.link.peer, host.link.index):
                return None
            own = {read_address(*each) for each in netlink.dump(*addresses())}
            up = ends[0].flags & (UP | NOARP) == UP | NOARP
            return up and ends[0].mac == mac and (ends[0].index, host.address) in own

    return namespace.run(look)


def _veths(netlink: Netlink) -> list[Link]:
    return [read_link(header, values) for header, values in netlink.dump(*veths())]


def _is_filtered(name: str) -> bool:
    try:
        return Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").read_text().strip() == "1"
    except OSError:
        return False


def _set_up(netlink: Netlink, index: int, name: str, local: IPv4Address, peer: IPv4Address, peer_mac: str) -> None:
    """What both ends get alike."""
    with suppress(OSError):  # a kernel without IPv6
        write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")
    write_sysctl(f"ipv4/conf/{name}/rp_filter", "1")
    netlink.run(
        # Without ARP first: switching it off later would drop the neighbour again.
        set_link(index, up=True, noarp=True),
        add_address(index, local, peer),
        replace_neighbour(peer, peer_mac, index),
    )


def _set_up_container(interface: str, address: IPv4Address) -> int:
    with Netlink() as netlink:
        index = socket.if_nametoindex(interface)
        _set_up(netlink, index, interface, address, GATEWAY, host_mac(address))
        netlink.run(replace_route(_EVERYWHERE, GATEWAY, index, address, PROTOCOL_BOOT))
    return namespace_number()
