"""Noticing what others do to Silk's part of the kernel, from the kernel's own notices (rtnetlink multicast groups).

While nobody touches anything nothing arrives, so watching costs nothing. What we do ourselves is told to us as well:
notices name the socket that asked (nlmsg_pid), and those of our own are dropped unread. Not all do (a VXLAN device's
forwarding entries, links on older kernels), and the kernel makes changes of its own; so a notice is only a reason to
look, and what is found as it must be ends there. Looking causes no notices, so no loop can come of it.

A socket that overflows has lost notices, and then everything is looked at.
"""

import errno
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from services.silk.links import interface_address
from services.silk.netlink import attributes, messages
from services.silk.rtnetlink import (
    DELADDR,
    DELLINK,
    DELNEIGH,
    DELROUTE,
    NEWADDR,
    NEWLINK,
    NEWNEIGH,
    NEWROUTE,
    NOARP,
    PROTOCOL_SILK,
    UP,
    Link,
    read_forwarding,
    read_link,
)

_SOL_NETLINK, _ADD_MEMBERSHIP, _SO_RCVBUFFORCE = 270, 1, 33
_LINK_GROUP, _NEIGHBOUR_GROUP, _ADDRESS_GROUP, _ROUTE_GROUP, _SETTINGS_GROUP = 1, 3, 5, 7, 24  # linux/rtnetlink.h
_NEWNETCONF = 80
_NETCONF_INDEX, _NETCONF_FORWARDING, _NETCONF_RP_FILTER = 1, 2, 3  # linux/netconf.h
_ALL_LINKS = -1
_RTA_DST, _RTA_OIF = 1, 4
_NDA_DST = 1
_IFA_LOCAL = 2
_AF_BRIDGE = 7
_BUFFER = 4 << 20
_AT_ONCE = 500

_INT = struct.Struct("=i")


@dataclass(slots=True)
class Noticed:
    """What there is reason to look at: the overlay device; routes and neighbours of ours; container links, by index.

    `down` are links that are not up as they must be. `forwarding` is what became of entries of the device: MAC ->
    destination, None for one that is gone; `neighbours` are those of the device that are gone. `vanished`: some
    container's link is no more. `settings`: forwarding of packets was switched off. `all`: notices were lost.
    """

    device: bool = False
    entries: bool = False
    links: set[int] = field(default_factory=set)
    down: set[int] = field(default_factory=set)
    forwarding: dict[str, IPv4Address | None] = field(default_factory=dict)
    neighbours: set[IPv4Address] = field(default_factory=set)
    vanished: bool = False
    settings: bool = False
    all: bool = False

    def __bool__(self) -> bool:
        entries = self.entries or bool(self.forwarding) or bool(self.neighbours)
        links = self.vanished or bool(self.links) or bool(self.down)
        return self.device or entries or links or self.settings or self.all


class Watch:
    """A socket that hears what happens in the network namespace of the thread that opens it. It never blocks.

    `overlay` are its networks, `vtep` the overlay device's name, `vtep_index` its index if there is one; `ours` the
    ports (nlmsg_pid) of the sockets whose changes are our own, `links` the links that there are. `underlay` is the
    cell's address there, `underlay_index` the link that has it: its MTU decides the device's.
    """

    def __init__(
        self,
        overlay: Collection[IPv4Network],
        vtep: str,
        vtep_index: int | None,
        *,
        ours: Collection[int],
        links: Collection[Link],
        underlay: IPv4Address | None = None,
        underlay_index: int | None = None,
    ) -> None:
        self._overlay = overlay
        self._vtep = vtep
        self._ours = ours
        self._vtep_index = vtep_index
        self._underlay, self._underlay_index = underlay, underlay_index
        self._underlay_mtu = 0
        self._containers = {link.index for link in links if interface_address(link.name) is not None}
        self._noticed = Noticed()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:  # root of a user namespace only; then it overflows sooner
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._socket.bind((0, 0))
        self._socket.setblocking(False)
        for group in (_LINK_GROUP, _NEIGHBOUR_GROUP, _ADDRESS_GROUP, _ROUTE_GROUP, _SETTINGS_GROUP):
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def take(self) -> Noticed:
        """What was noticed since the last time."""
        noticed, self._noticed = self._noticed, Noticed()
        return noticed

    def read(self) -> bool:
        """Read notices that have arrived, some hundreds at most; whether there is now something to `take`."""
        for data in self._received():
            for kind, _, _, body, port in messages(data):
                self._notice(kind, body, port in self._ours)
        return bool(self._noticed)

    def _received(self) -> Iterator[bytes]:
        for _ in range(_AT_ONCE):
            try:
                yield self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._noticed.all = True

    def _notice(self, kind: int, body: bytes, ours: bool) -> None:
        if kind in (NEWLINK, DELLINK):
            self._link(kind, body, ours)
        elif ours:
            return
        elif kind in (NEWNEIGH, DELNEIGH):
            self._neighbour(kind, body)
        elif kind in (NEWADDR, DELADDR):
            index = _INT.unpack_from(body, 4)[0]
            local = attributes(body[8:]).get(_IFA_LOCAL)
            if index == self._vtep_index:
                self._noticed.device = True
            elif kind == NEWADDR and self._underlay is not None and local == self._underlay.packed:
                self._underlay_index, self._noticed.device = index, True
            elif kind == DELADDR and index in self._containers:
                self._noticed.links.add(index)
        elif kind in (NEWROUTE, DELROUTE):
            self._route(kind, body)
        elif kind == _NEWNETCONF:
            self._setting(body)

    def _link(self, kind: int, body: bytes, ours: bool) -> None:
        if body[0] == _AF_BRIDGE:
            return  # a bridge tells of its ports in the form of links
        values = attributes(body[16:])
        link = read_link(body[:16], values)
        if link.name == self._vtep:
            self._vtep_index = link.index if kind == NEWLINK else None
            self._noticed.device |= not ours
        elif link.index == self._vtep_index:  # renamed
            self._noticed.device = True
        if link.index == self._underlay_index and link.mtu != self._underlay_mtu:
            self._underlay_mtu, self._noticed.device = link.mtu, True
        if interface_address(link.name) is None:
            if link.index in self._containers:
                self._containers.discard(link.index)
                self._noticed.vanished = True
        elif kind == DELLINK:
            self._containers.discard(link.index)
            self._noticed.links.discard(link.index)  # it told of its address and its routes first
            self._noticed.down.discard(link.index)
            self._noticed.vanished = True
        else:
            self._containers.add(link.index)
            if link.flags & (UP | NOARP) == UP | NOARP:
                self._noticed.down.discard(link.index)  # it is only now being made
            elif not ours:
                self._noticed.down.add(link.index)

    def _neighbour(self, kind: int, body: bytes) -> None:
        family, index = body[0], _INT.unpack_from(body, 4)[0]
        if index in self._containers:
            self._noticed.links.add(index)
        elif index != self._vtep_index:
            return
        elif family == _AF_BRIDGE:
            entry = read_forwarding(body[:12], attributes(body[12:]), index)
            if entry is None:
                self._noticed.entries = True
            else:
                self._noticed.forwarding[entry[0]] = entry[1] if kind == NEWNEIGH else None
        elif kind == DELNEIGH:  # not told by whom
            self._noticed.neighbours.add(IPv4Address(attributes(body[12:])[_NDA_DST]))
        else:
            self._noticed.entries = True

    def _route(self, kind: int, body: bytes) -> None:
        values = attributes(body[12:])
        index = _INT.unpack(values.get(_RTA_OIF, bytes(4)))[0]
        destination = IPv4Address(values.get(_RTA_DST, bytes(4)))
        if body[5] == PROTOCOL_SILK:
            # Without a device it is our subnet's unreachable route, which is the device's affair.
            self._noticed.entries = True
            self._noticed.device |= index == 0
        elif index == self._vtep_index:
            self._noticed.device |= kind == DELROUTE
            self._noticed.entries = True
        elif index in self._containers:
            if kind == DELROUTE:
                self._noticed.links.add(index)
        elif any(destination in network for network in self._overlay):
            # It may have replaced one of ours, which is not told by itself.
            self._noticed.entries = True
            self._noticed.links |= self._containers

    def _setting(self, body: bytes) -> None:
        values = {kind: _INT.unpack(value)[0] for kind, value in attributes(body[4:]).items() if len(value) == 4}
        index = values.get(_NETCONF_INDEX)
        if index == _ALL_LINKS and values.get(_NETCONF_FORWARDING) == 0:
            self._noticed.settings = True
        elif index in self._containers and values.get(_NETCONF_RP_FILTER, 1) != 1:
            self._noticed.links.add(index)
