"""The entries that lead to the other cells: per lease one route, one neighbour, one forwarding (FDB) entry.

    route       SUBNET via BASE dev VTEP src OWN-BASE    which cell a container is on
    neighbour   BASE lladdr MAC dev VTEP                 the MAC of that cell's VTEP
    forwarding  MAC dev VTEP dst UNDERLAY                where that VTEP is

Desired entries are computed from the leases, actual ones remembered from what was carried out and read back at the
start and in each sweep; the kernel gets the difference. Other people's entries are never touched: ours are the routes
and neighbours that carry our protocol number, and whatever on the VTEP has the form that Silk derives from subnets of
the overlay, forwarding entries (the kernel keeps no owner of those) and what the original's daemon left.
"""

import errno
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from bus.log import about
from bus.messages import Lease
from services.silk.netlink import Message, Netlink
from services.silk.rtnetlink import (
    PROTOCOL_SILK,
    delete_forwarding,
    delete_neighbour,
    delete_route,
    forwarding,
    neighbours,
    read_forwarding,
    read_neighbour,
    read_route,
    replace_forwarding,
    replace_neighbour,
    replace_route,
    routes,
)
from services.silk.subnets import vtep_address

log = logging.getLogger(__name__)

_GONE = {errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL}


@dataclass(slots=True)
class Entries:
    """What leads to the other cells: subnet -> (gateway, source), gateway -> MAC, MAC -> underlay address."""

    routes: dict[IPv4Network, tuple[IPv4Address, IPv4Address]] = field(default_factory=dict)
    neighbours: dict[IPv4Address, str] = field(default_factory=dict)
    forwarding: dict[str, IPv4Address] = field(default_factory=dict)


def desired(own: Lease, overlay: Collection[IPv4Network], leases: Iterable[Lease]) -> Entries:
    """The entries for all leases but our own and those outside the overlay."""
    entries = Entries()
    source = own.subnet.network_address
    for lease in leases:
        # A lease with our underlay address or an overlapping subnet would take our own traffic away.
        if lease.underlay == own.underlay or lease.subnet.overlaps(own.subnet):
            continue
        if not any(lease.subnet.subnet_of(network) for network in overlay):
            continue
        gateway = lease.subnet.network_address
        entries.routes[lease.subnet] = (gateway, source)
        entries.neighbours[gateway] = lease.mac
        entries.forwarding[lease.mac] = lease.underlay
    return entries


@dataclass(frozen=True, slots=True)
class Result:
    """How many entries were changed, and what the kernel refused (named in the log); those are tried again.

    `drifted` is how many somebody else had changed.
    """

    changed: int
    failed: int
    drifted: int = 0


class Peers:
    """The entries on one VTEP, `index`, in the network namespace that `netlink` was opened in. All methods block."""

    def __init__(self, netlink: Netlink, index: int, overlay: Collection[IPv4Network]) -> None:
        self._netlink = netlink
        self._index = index
        self._overlay = overlay
        self._actual = self._read()

    def sweep(self, wanted: Entries, *, delete: bool = True) -> Result:
        """Read what the kernel has and make it what is wanted."""
        believed, self._actual = self._actual, self._read()
        drifted = _differences(believed, self._actual)
        if drifted:
            fields = about(entries=drifted, device=self._index)
            log.warning("overlay entries had drifted: somebody else changed them", extra=fields)
        return replace(self.apply(wanted, delete=delete), drifted=drifted)

    def contradicts(self, forwarding: Mapping[str, IPv4Address | None], gone: Collection[IPv4Address]) -> bool:
        """Whether we made something else of these entries: MAC -> destination, None if gone; and neighbours gone."""
        actual = self._actual
        moved = (actual.forwarding.get(mac) != to and _is_vteps(mac, self._overlay) for mac, to in forwarding.items())
        return any(moved) or any(address in actual.neighbours for address in gone)

    def apply(self, wanted: Entries, *, delete: bool = True) -> Result:
        """Carry out the difference to what is there. Without `delete` nothing is removed, only added and changed."""
        changes = [*self._replacements(wanted), *(self._deletions(wanted) if delete else ())]
        try:
            failures = self._netlink.apply([change.message for change in changes])
        except OSError:
            self._actual = self._read()  # nobody knows how far it came
            raise
        failed = 0
        for index, change in enumerate(changes):
            error = failures.get(index)
            if error is None or (change.value is None and error.errno in _GONE):
                change.note()
            else:
                failed += 1
                log.error("overlay entry refused by the kernel", extra=about(error=str(error)))
        return Result(len(changes) - failed, failed)

    def _replacements(self, wanted: Entries) -> "Iterator[_Change]":
        # In this order a route never leads to a neighbour that is not there yet.
        actual, index = self._actual, self._index
        for mac, underlay in wanted.forwarding.items():
            if actual.forwarding.get(mac) != underlay:
                yield _Change(replace_forwarding(mac, underlay, index), actual.forwarding, mac, underlay)
        for address, mac in wanted.neighbours.items():
            if actual.neighbours.get(address) != mac:
                yield _Change(replace_neighbour(address, mac, index), actual.neighbours, address, mac)
        for subnet, (gateway, source) in wanted.routes.items():
            if actual.routes.get(subnet) != (gateway, source):
                message = replace_route(subnet, gateway, index, source, PROTOCOL_SILK, onlink=True)
                yield _Change(message, actual.routes, subnet, (gateway, source))

    def _deletions(self, wanted: Entries) -> "Iterator[_Change]":
        actual, index = self._actual, self._index
        for subnet, (gateway, _) in actual.routes.items():
            if subnet not in wanted.routes:
                yield _Change(delete_route(subnet, gateway, index), actual.routes, subnet)
        for address in actual.neighbours:
            if address not in wanted.neighbours:
                yield _Change(delete_neighbour(address, index), actual.neighbours, address)
        for mac, underlay in actual.forwarding.items():
            if mac not in wanted.forwarding:
                yield _Change(delete_forwarding(mac, underlay, index), actual.forwarding, mac)

    def _read(self) -> Entries:
        """What the kernel has of ours on the VTEP."""
        entries = Entries()
        for header, values in self._netlink.dump(*routes()):
            route = read_route(header, values, anybodys=True)
            if route is None or route.index != self._index or route.gateway is None:
                continue
            silks = route.gateway == route.prefix.network_address and _in(route.gateway, self._overlay)
            if silks or read_route(header, values) is not None:
                entries.routes[route.prefix] = (route.gateway, route.source)
        for header, values in self._netlink.dump(*neighbours()):
            neighbour = read_neighbour(header, values, self._index, anybodys=True)
            if neighbour is None:
                continue
            silks = vtep_address(neighbour[1]) == neighbour[0] and _in(neighbour[0], self._overlay)
            if silks or read_neighbour(header, values, self._index) is not None:
                entries.neighbours[neighbour[0]] = neighbour[1]
        for header, values in self._netlink.dump(*forwarding(self._index)):
            entry = read_forwarding(header, values, self._index)
            if entry is not None and _is_vteps(entry[0], self._overlay):
                entries.forwarding[entry[0]] = entry[1]
        return entries


def _is_vteps(mac: str, overlay: Collection[IPv4Network]) -> bool:
    base = vtep_address(mac)
    return base is not None and _in(base, overlay)


def _in(address: IPv4Address, networks: Collection[IPv4Network]) -> bool:
    return any(address in network for network in networks)


def _differences(one: Entries, other: Entries) -> int:
    """How many entries are not alike."""
    pairs: list[tuple[dict[Any, Any], dict[Any, Any]]] = [
        (one.routes, other.routes),
        (one.neighbours, other.neighbours),
        (one.forwarding, other.forwarding),
    ]
    return sum(len({key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class _Change:
    """A request, and what is to be remembered once it is carried out: `key` has `value`, or is gone if that is None."""

    message: Message
    known: dict[Any, Any]
    key: Any
    value: Any = None

    def note(self) -> None:
        if self.value is None:
            self.known.pop(self.key, None)
        else:
            self.known[self.key] = self.value
