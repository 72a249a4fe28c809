"""What on a cell is in Silk's way, said in plain words to whoever runs it (GET /problems, the log).

Nothing here is changed or repaired: these are things of the machine, the network around it or the deployment. All of it
is read from the kernel and /etc at the moment of asking, and blocks.
"""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bus.messages import Lease
from services.silk.links import ContainerLink, interface_address
from services.silk.netlink import Netlink
from services.silk.overlay import VXLAN_OVERHEAD, Overlay, port_sharers
from services.silk.rtnetlink import addresses, all_links, read_any_route, read_link, read_prefix, routes

_THRESHOLD = Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3")
_RESOLVERS = Path("/etc/resolv.conf")
_SPARE_NEIGHBOURS = 128


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong: what it concerns, and in words what it is and what to do."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the cell: its overlay, its lease, all leases, and the links of its containers."""

    overlay: Overlay
    own: Lease | None
    leases: list[Lease]
    links: list[ContainerLink]


def find(cell: Facts) -> list[Problem]:
    """Everything that is wrong. Blocks. Raises OSError."""
    with Netlink() as netlink:
        return [*_overlaps(netlink, cell), *_sizes(netlink, cell), *_neighbours(netlink, cell), *_others(cell)]


def _in(address: IPv4Address, networks: Iterable[IPv4Network]) -> bool:
    return any(address in network for network in networks)


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"


def _overlaps(netlink: Netlink, cell: Facts) -> Iterator[Problem]:
    """The machine's own addresses, routes and name servers where only containers may be."""
    networks, vtep = cell.overlay.networks, cell.overlay.name
    for header, values in netlink.dump(*addresses()):
        index, address = read_prefix(header, values)
        if _in(address.ip, networks) and _name(index) != vtep:
            text = f"address {address.ip} of {_name(index)} lies in the overlay network: no container may have it, and"
            yield Problem("overlap", f"{text} other cells look for it elsewhere; give the machine another address")
    for header, values in netlink.dump(*routes()):
        route = read_any_route(header, values)
        if route is None or not route.prefix.prefixlen:
            continue
        name = _name(route.index) if route.index else "no interface"
        if name == vtep or interface_address(name) is not None or route.ours:
            continue
        for network in networks:
            if route.prefix.subnet_of(network):
                text = f"route {route.prefix} by {name} takes traffic of the overlay network {network}: remove it, or"
                yield Problem("overlap", f"{text} choose an overlay network that is used for nothing else")
            elif route.direct and network.subnet_of(route.prefix):
                text = f"the network {route.prefix} of {name} contains the overlay network {network}: its hosts there"
                yield Problem("overlap", f"{text} cannot be reached from this cell")
    for server in _resolvers():
        if _in(server, networks):
            text = f"name server {server} of {_RESOLVERS} lies in the overlay network, where it cannot be reached:"
            yield Problem("overlap", f"{text} use another name server or another overlay network")


def _resolvers() -> Iterator[IPv4Address]:
    try:
        lines = _RESOLVERS.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                yield IPv4Address(words[1])
            except ValueError:
                continue


def _sizes(netlink: Netlink, cell: Facts) -> Iterator[Problem]:
    """MTUs that do not fit together."""
    index = _underlay_link(netlink, cell.overlay)
    links = {link.index: link for link in (read_link(*each) for each in netlink.dump(*all_links()))}
    vtep = next((link for link in links.values() if link.name == cell.overlay.name), None)
    if vtep is None:
        return
    if index in links and vtep.mtu + VXLAN_OVERHEAD > links[index].mtu:
        text = f"{vtep.name} has an MTU of {vtep.mtu}, which with VXLAN's {VXLAN_OVERHEAD} bytes is more than the"
        text += f" {links[index].mtu} of {links[index].name}: large packets are fragmented or lost; set 'mtu' to"
        yield Problem("mtu", f"{text} {links[index].mtu - VXLAN_OVERHEAD} or less, or to 0")
    other = [link for link in cell.links if link.link.mtu != vtep.mtu]
    if other:
        text = f"{len(other)} containers, as {other[0].handle or other[0].link.name}, were attached with an MTU of"
        text += f" {other[0].link.mtu}, and the overlay has {vtep.mtu} now: packets between may be lost; restart them"
        yield Problem("mtu", text)


def _underlay_link(netlink: Netlink, overlay: Overlay) -> int | None:
    found = (read_prefix(*each) for each in netlink.dump(*addresses()))
    return next((index for index, address in found if address.ip == overlay.underlay), None)


def _neighbours(netlink: Netlink, cell: Facts) -> Iterator[Problem]:
    """Room for the underlay's neighbours. The overlay's own are permanent, and those have no limit (measured)."""
    try:
        limit = int(_THRESHOLD.read_text())
    except (OSError, ValueError):
        return  # a network namespace does not see it
    for header, values in netlink.dump(*addresses()):
        _, address = read_prefix(header, values)
        if address.ip != cell.overlay.underlay:
            continue
        near = sum(1 for lease in cell.leases if lease.underlay in address.network)
        if near + _SPARE_NEIGHBOURS > limit:
            text = f"{near} cells are on the underlay's own network {address.network}, and the kernel remembers"
            text += f" {limit} neighbours at most: set net.ipv4.neigh.default.gc_thresh3 to {4 * near} or more, and"
            yield Problem("neighbours", f"{text} gc_thresh2 to half of that")


def _others(cell: Facts) -> Iterator[Problem]:
    """What others have in places that are ours."""
    strangers = [link.link.name for link in cell.links if not link.handle]
    if strangers:
        text = f"{len(strangers)} container links, as {strangers[0]}, were not made by this worker: their addresses are"
        yield Problem("links", f"{text} not given to others, and they stay until whoever made them removes them")
    for name in port_sharers(cell.overlay):
        text = f"VXLAN device {name} uses UDP port {cell.overlay.port}, too: what it receives from others than cells is"
        yield Problem("port", f"{text} dropped; give it another port, or set another 'vtep_port' on all cells")
    for lease in cell.leases:
        if cell.own is None or lease.subnet == cell.own.subnet:
            continue
        if lease.underlay == cell.own.underlay:
            text = (
                f"cell {lease.cell} has a lease of {lease.subnet} with this cell's underlay address {lease.underlay}:"
            )
            yield Problem("leases", f"{text} release the one that is no more")
        elif lease.subnet.overlaps(cell.own.subnet):
            text = f"cell {lease.cell} has a lease of {lease.subnet}, which overlaps this cell's {cell.own.subnet}:"
            yield Problem("leases", f"{text} release one of them")
    outside = [x for x in cell.leases if not any(x.subnet.subnet_of(network) for network in cell.overlay.networks)]
    if outside:
        text = f"{len(outside)} leases, as {outside[0].subnet} of {outside[0].cell}, are outside 'overlay_network'"
        text += f" ({', '.join(map(str, cell.overlay.networks))}) and not followed: set it as on the controller"
        yield Problem("leases", text)
