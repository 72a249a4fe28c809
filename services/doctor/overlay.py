"""The overlay as it stands: its device, MTU, neighbours, and whether its addresses are anybody else's, too."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from services.doctor.finding import Finding, fine, unknown, warning, wrong
from services.doctor.settings import DoctorSettings

OVERHEAD = 50
"""Bytes that VXLAN puts before a packet over IPv4 (RFC 7348)."""
HEADERS = 28
"""Of IPv4 and ICMP, before the payload of a ping."""
MAX_PINGED = 3
TIMEOUT = 10.0
UP = 1
RESOLVERS = Path("/etc/resolv.conf")
MAIN_TABLE = 254


def vtep(ipr: IPRoute, settings: DoctorSettings) -> Any | None:
    return next(iter(ipr.link("dump", ifname=settings.vtep_name)), None)


def parent(ipr: IPRoute, device: Any) -> Any | None:
    """The link that the overlay goes over; None if the device is bound to none."""
    data = device.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    index = None if data is None else data.get_attr("IFLA_VXLAN_LINK")
    return None if not index else ipr.link("get", index=index)[0]


def peers(ipr: IPRoute, device: Any) -> list[IPv4Address]:
    """The underlay addresses of the other cells: those of the device's forwarding table."""
    entries = ipr.fdb("dump", ifindex=device["index"])
    found = (entry.get_attr("NDA_DST") for entry in entries if entry["ifindex"] == device["index"])
    return sorted({IPv4Address(address) for address in found if address})


def look_at_device(settings: DoctorSettings) -> Iterator[Finding]:
    """The VXLAN device, and the MTUs along the way."""
    check = "overlay"
    with IPRoute() as ipr:
        device = vtep(ipr, settings)
        if device is None:
            text = f"there is no device {settings.vtep_name}"
            yield wrong(check, text, "see the silk worker's log: it makes the device once this cell has a lease")
            return
        data = device.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
        if device.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "vxlan" or data is None:
            text = f"{settings.vtep_name} is no VXLAN device"
            yield wrong(check, text, "remove it, or choose another vtep_name; then restart the silk worker")
            return
        if not device["flags"] & UP:
            text = f"{settings.vtep_name} is down: this cell is fenced, its lease ran out"
            yield wrong(check, text, "see whether the Silk controller and the bus can be reached (below)")
        if data.get_attr("IFLA_VXLAN_GBP") is None:
            text = f"{settings.vtep_name} carries no tags (GBP is off): other cells refuse what comes from here"
            yield wrong(
                check, text, f"ip link delete {settings.vtep_name}; the silk worker makes it anew when restarted"
            )
        if data.get_attr("IFLA_VXLAN_PORT") != settings.vtep_port:
            text = f"{settings.vtep_name} uses UDP port {data.get_attr('IFLA_VXLAN_PORT')}, not {settings.vtep_port}"
            yield wrong(check, text, "set vtep_port to the same on all cells, for the silk worker and the enforcer")
        yield from _mtu(ipr, device, settings)


def _mtu(ipr: IPRoute, device: Any, settings: DoctorSettings) -> Iterator[Finding]:
    check = "mtu"
    below = parent(ipr, device)
    if below is None:
        yield warning(check, f"{settings.vtep_name} is bound to no device", "restart the silk worker")
        return
    mtu, under, name = device.get_attr("IFLA_MTU"), below.get_attr("IFLA_MTU"), below.get_attr("IFLA_IFNAME")
    if mtu > under - OVERHEAD:
        yield wrong(
            check,
            f"{settings.vtep_name} has MTU {mtu}; with VXLAN's {OVERHEAD} bytes more than the {under} of {name}",
            f"set the silk worker's mtu to {under - OVERHEAD} or 0 and restart it; recreate the containers",
        )
    links = {
        link.get_attr("IFLA_IFNAME"): link.get_attr("IFLA_MTU")
        for link in ipr.link("dump")
        if link.get_attr("IFLA_IFNAME").startswith(settings.link_prefix)
    }
    if larger := sorted(link for link, size in links.items() if size > mtu):
        text = f"containers' links with a larger MTU than the overlay's {mtu}: {_some(larger)}"
        yield wrong(check, text, "recreate these containers: their links were made with another MTU")
    found = peers(ipr, device)
    lost = [peer for peer in found[:MAX_PINGED] if _answers(peer, 0) and not _answers(peer, mtu + OVERHEAD - HEADERS)]
    if lost:
        yield wrong(
            check,
            f"packets of {mtu + OVERHEAD} bytes do not reach {_some(lost)} over {name}, small ones do",
            f"raise the MTU of the network between the cells, or set the silk workers' mtu lower than {mtu}",
        )
    elif mtu <= under - OVERHEAD and not larger:
        yield fine(
            check, f"{mtu} in the overlay over {under} of {name}; {len(links)} containers, {len(found)} other cells"
        )


def _answers(peer: IPv4Address, payload: int) -> bool:
    """Whether it answers a ping with so many bytes, unfragmented. True where nobody can ask."""
    program = shutil.which("ping")
    if program is None:
        return payload != 0
    command = [program, "-n", "-q", "-c", "2", "-i", "0.3", "-W", "1", "-M", "do", "-s", str(payload), str(peer)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)  # noqa: S603 (our own words)
    return done.returncode == 0


def look_at_neighbours(settings: DoctorSettings) -> Iterator[Finding]:
    """Is there room for one permanent neighbour for each other cell, and one for each container?"""
    check = "neighbours"
    with IPRoute() as ipr:
        entries = len(list(ipr.get_neighbours(family=2)))
        device = vtep(ipr, settings)
        cells = 0 if device is None else len(peers(ipr, device))
    yield from judge_neighbours(check, entries, cells, _number("gc_thresh3"), _overflows())


def judge_neighbours(check: str, entries: int, cells: int, limit: int | None, overflows: int) -> Iterator[Finding]:
    remedy = (
        "sysctl -w net.ipv4.neigh.default.gc_thresh1=2048 net.ipv4.neigh.default.gc_thresh2=4096"
        " net.ipv4.neigh.default.gc_thresh3=8192, and write it to /etc/sysctl.d; more beyond 4000 cells"
    )
    if limit is None:
        yield unknown(check, "the kernel's limit is not to be seen from this namespace")
    elif entries > 0.6 * limit:
        yield wrong(
            check, f"{entries} entries ({cells} other cells) of at most {limit}: beyond, cells are lost", remedy
        )
    else:
        yield fine(check, f"{entries} entries ({cells} other cells) of at most {limit}")
    if overflows:
        yield warning(check, f"the table was full {overflows} times since the start", remedy)


def _number(name: str) -> int | None:
    try:
        return int(Path(f"/proc/sys/net/ipv4/neigh/default/{name}").read_text())
    except OSError:
        return None


def _overflows() -> int:
    """How often the kernel had no room, by /proc/net/stat/arp_cache: a line a CPU, hexadecimal."""
    try:
        header, *lines = Path("/proc/net/stat/arp_cache").read_text().splitlines()
    except OSError:
        return 0
    names = header.split()
    if "table_fulls" not in names:
        return 0
    return sum(int(line.split()[names.index("table_fulls")], 16) for line in lines)


def look_at_addresses(settings: DoctorSettings) -> Iterator[Finding]:
    """Does anything of this host lie in the overlay?"""
    with IPRoute() as ipr:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.link("dump")}
        routes = [
            (IPv4Network((route.get_attr("RTA_DST"), route["dst_len"])), names.get(route.get_attr("RTA_OIF")))
            for route in ipr.get_routes(family=2)
            if route.get_attr("RTA_DST") is not None and route.get_attr("RTA_TABLE") == MAIN_TABLE
        ]
        addresses = [
            (IPv4Address(address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")), names[address["index"]])
            for address in ipr.get_addr(family=2)
        ]
    ours = (settings.vtep_name, settings.link_prefix)
    foreign = [(network, device) for network, device in routes if device and not device.startswith(ours)]
    located = [(address, device) for address, device in addresses if not device.startswith(ours)]
    try:
        resolvers = resolvers_of(RESOLVERS.read_text())
    except OSError:
        resolvers = []
    for overlay in settings.overlay_network:
        yield from judge_addresses(overlay, foreign, located, resolvers)


def resolvers_of(text: str) -> list[IPv4Address]:
    """The IPv4 name servers of a resolv.conf(5)."""
    found = re.findall(r"^\s*nameserver\s+(\d+\.\d+\.\d+\.\d+)", text, re.MULTILINE)
    return [IPv4Address(address) for address in found]


def judge_addresses(
    overlay: IPv4Network,
    routes: Iterable[tuple[IPv4Network, str]],
    addresses: Iterable[tuple[IPv4Address, str]],
    resolvers: Iterable[IPv4Address],
) -> Iterator[Finding]:
    """What is to be said of routes and addresses that are not the overlay's own."""
    check = "addresses"
    remedy = "choose another overlay_network, on all cells and the Silk controller; or renumber the other"
    quiet = True
    for network, device in routes:
        if network.subnet_of(overlay):
            quiet = False
            yield wrong(check, f"the route {network} by {device} takes traffic out of the overlay {overlay}", remedy)
        elif network.prefixlen and overlay.subnet_of(network):
            quiet = False
            text = f"the overlay {overlay} lies in {network}, to which {device} leads: what is there cannot be reached"
            yield warning(check, text, remedy)
    for address, device in addresses:
        if address in overlay:
            quiet = False
            yield wrong(check, f"{device} has the address {address}, which lies in the overlay {overlay}", remedy)
    for address in resolvers:
        if address in overlay:
            quiet = False
            text = f"the resolver {address} ({RESOLVERS}) lies in the overlay {overlay}: names will not be found"
            yield wrong(check, text, remedy)
    if quiet:
        yield fine(check, f"no route, address or resolver of this host lies in the overlay {overlay}")


def _some(items: Iterable[object]) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
