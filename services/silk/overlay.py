"""This cell's VXLAN device, in the form of contract/cell.md 5.3, so that cells of the original Silk understand it.

The device belongs to the lease, not to the process: it stays when the worker ends, and is made anew only if what
cannot be changed in place is not as it must be. A restart therefore loses no packet.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from bus.log import about
from bus.messages import Lease
from services.silk.netlink import Netlink
from services.silk.rtnetlink import SCOPE_LINK, UP, delete_unreachable, read_route, replace_unreachable, routes

log = logging.getLogger(__name__)

VXLAN_OVERHEAD = 50


class OverlayError(Exception):
    """The overlay cannot be set up. The text says what is in the way and what to do."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """What the device must be, but for the lease."""

    networks: tuple[IPv4Network, ...]
    underlay: IPv4Address
    vni: int
    port: int
    name: str
    mtu: int = 0

    def network_of(self, subnet: IPv4Network) -> IPv4Network:
        """The overlay's network that a leased subnet lies in. Raises OverlayError."""
        for network in self.networks:
            if subnet.subnet_of(network):
                return network
        raise OverlayError(f"subnet {subnet} is in none of the overlay's networks: correct 'overlay_network'")


@dataclass(frozen=True, slots=True)
class Device:
    """The device as it stands: its index in this namespace, and its MTU, which is the containers' too.

    `changes` is what had to be changed of it, in words.
    """

    index: int
    mtu: int
    changes: tuple[str, ...] = ()


def ensure(overlay: Overlay, lease: Lease) -> Device:
    """Make the device exactly as it must be for this lease, changing no more than is needed, and set it up.

    Blocks. Works in the network namespace of the calling thread. Raises OverlayError or OSError.
    """
    changes = []
    network = overlay.network_of(lease.subnet)
    with _explained(overlay), IPRoute() as ipr:
        parent = _parent(ipr, overlay)
        most = parent.get_attr("IFLA_MTU") - VXLAN_OVERHEAD
        mtu = overlay.mtu or most
        if mtu > most:
            raise OverlayError(
                f"'mtu' is {mtu}, and with VXLAN's {VXLAN_OVERHEAD} bytes that is more than the MTU of"
                f" {parent.get_attr('IFLA_IFNAME')}, {most + VXLAN_OVERHEAD}: set it to {most} or less, or to 0"
            )
        link = _link(ipr, overlay.name)
        if link is not None and (reason := _unlike(link, overlay, lease, parent["index"])):
            _refuse_foreign(link, overlay)
            log.warning("replacing the overlay device", extra=about(device=overlay.name, reason=reason))
            ipr.link("del", index=link["index"])
            changes.append(reason)
            link = None
        elif link is None:
            changes.append("there was none")
        if link is None:
            log.info("creating the overlay device", extra=about(device=overlay.name, subnet=str(lease.subnet), mtu=mtu))
            link = _create(ipr, overlay, lease, parent["index"], mtu)
        index: int = link["index"]
        if (has := link.get_attr("IFLA_MTU")) != mtu:
            ipr.link("set", index=index, mtu=mtu)
            changes.append(f"MTU is {has}, not {mtu}")
        if not link["flags"] & UP:
            ipr.link("set", index=index, state="up")
            changes.append("it is down")
        if _ensure_address(ipr, index, lease.subnet.network_address, network.prefixlen):
            changes.append("its address is not as it must be")
    # A subnet of one address is the device's own.
    dead_ends = {lease.subnet} if lease.subnet.prefixlen < 32 else set()
    if _ensure_unreachable(dead_ends | (set(overlay.networks) - {network})):
        changes.append("the unreachable routes are not as they must be")
    return Device(index, mtu, tuple(changes))


def fence(overlay: Overlay) -> bool:
    """Set the device down: this cell neither sends nor takes anything over the overlay. Whether it was up."""
    with _explained(overlay), IPRoute() as ipr:
        link = _link(ipr, overlay.name)
        up = link is not None and bool(link["flags"] & UP)
        if link is not None and up:
            ipr.link("set", index=link["index"], state="down")
        return up


def index(overlay: Overlay) -> int | None:
    """The device's index, if it stands, up or not."""
    with _explained(overlay), IPRoute() as ipr:
        link = _link(ipr, overlay.name)
        return None if link is None else link["index"]


def underlay_index(overlay: Overlay) -> int | None:
    """The index of the link that has the underlay address, if one has."""
    with _explained(overlay), IPRoute() as ipr:
        return next((address["index"] for address in ipr.get_addr(address=str(overlay.underlay))), None)


def remove(overlay: Overlay) -> None:
    """Delete the device, and the subnet's route. No device is no error; one that is no VXLAN device is not ours."""
    with _explained(overlay), IPRoute() as ipr:
        link = _link(ipr, overlay.name)
        if link is not None:
            _refuse_foreign(link, overlay)
            ipr.link("del", index=link["index"])
    _ensure_unreachable(set())


@contextmanager
def _explained(overlay: Overlay) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        text = f"the kernel refused to set up the overlay device {overlay.name}: {error}"
        if error.code in (errno.EADDRINUSE, errno.EEXIST):
            users = port_users(overlay)
            text += (
                f"; UDP port {overlay.port} or VNI {overlay.vni} is in use by {users or 'somebody else'}:"
                " end that, or choose another 'vtep_port' (the same on all cells)"
            )
        raise OverlayError(text) from error


def port_sharers(overlay: Overlay) -> list[str]:
    """The other VXLAN devices that use the overlay's UDP port, by name and VNI."""
    sharers = []
    with IPRoute() as ipr:
        for link in ipr.link("dump", kind="vxlan"):
            name, data = link.get_attr("IFLA_IFNAME"), link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
            if name != overlay.name and data is not None and data.get_attr("IFLA_VXLAN_PORT") == overlay.port:
                sharers.append(f"{name} (VNI {data.get_attr('IFLA_VXLAN_ID')})")
    return sharers


def port_users(overlay: Overlay) -> str:
    """Who else uses the overlay's UDP port: VXLAN devices, and programs' sockets; empty if nobody."""
    users = [f"the VXLAN device {name}" for name in port_sharers(overlay)]
    for family in ("udp", "udp6"):
        with suppress(OSError):
            for line in Path(f"/proc/thread-self/net/{family}").read_text().splitlines()[1:]:
                fields = line.split()
                # The kernel's own sockets, VXLAN's, have no inode and are not listed.
                if int(fields[1].rpartition(":")[2], 16) == overlay.port:
                    users.append(f"a program's {family} socket (inode {fields[9]}; see ss -ulnp)")
    return ", ".join(users)


def _link(ipr: IPRoute, name: str) -> Any | None:
    return next(iter(ipr.link("dump", ifname=name)), None)


def _parent(ipr: IPRoute, overlay: Overlay) -> Any:
    """The link that holds the underlay address."""
    for address in ipr.get_addr(address=str(overlay.underlay)):
        return ipr.link("get", index=address["index"])[0]
    raise OverlayError(f"no interface has the underlay address {overlay.underlay}: correct the setting 'underlay'")


def _refuse_foreign(link: Any, overlay: Overlay) -> None:
    kind = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
    if kind != "vxlan":
        raise OverlayError(
            f"{overlay.name} exists and is no VXLAN device but {kind or 'a physical one'}:"
            " remove it or choose another 'vtep_name'"
        )


def _unlike(link: Any, overlay: Overlay, lease: Lease, parent: int) -> str | None:
    """What of the device is not as it must be and cannot be changed while it is in use."""
    info = link.get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "vxlan":
        return "it is not a VXLAN device"
    data = info.get_attr("IFLA_INFO_DATA")
    facts: dict[str, tuple[object, object]] = {
        "vni": (data.get_attr("IFLA_VXLAN_ID"), overlay.vni),
        "local": (data.get_attr("IFLA_VXLAN_LOCAL"), str(overlay.underlay)),
        "parent": (data.get_attr("IFLA_VXLAN_LINK"), parent),
        "port": (data.get_attr("IFLA_VXLAN_PORT"), overlay.port),
        "gbp": (data.get_attr("IFLA_VXLAN_GBP") is not None, True),
        "learning": (bool(data.get_attr("IFLA_VXLAN_LEARNING")), False),
        "mac": (link.get_attr("IFLA_ADDRESS"), lease.mac),
    }
    wrong = [f"{name} is {has}, not {want}" for name, (has, want) in facts.items() if has != want]
    return "; ".join(wrong) or None


def _create(ipr: IPRoute, overlay: Overlay, lease: Lease, parent: int, mtu: int) -> Any:
    ipr.link(
        "add",
        ifname=overlay.name,
        kind="vxlan",
        vxlan_id=overlay.vni,
        vxlan_local=str(overlay.underlay),
        vxlan_link=parent,
        vxlan_port=overlay.port,
        vxlan_gbp=True,
        vxlan_learning=False,
        address=lease.mac,
        mtu=mtu,
    )
    return _link(ipr, overlay.name)


def _ensure_address(ipr: IPRoute, index: int, base: IPv4Address, prefix_length: int) -> bool:
    """The subnet's base address with the overlay's prefix, scope link, and no other; whether it was not so."""
    right, others = False, False
    for address in ipr.get_addr(index=index, family=2):
        has = (address.get_attr("IFA_LOCAL"), address["prefixlen"], address["scope"])
        if has == (str(base), prefix_length, SCOPE_LINK):
            right = True
        else:
            ipr.addr("del", index=index, address=has[0], prefixlen=has[1])
            others = True
    if not right:
        ipr.addr("add", index=index, address=str(base), prefixlen=prefix_length, scope=SCOPE_LINK)
    return others or not right


def _ensure_unreachable(prefixes: set[IPv4Network]) -> bool:
    """Packets to addresses of these that nobody has end here, and not elsewhere; whether it was not so.

    They are our own subnet and the overlay's networks that the device's address is not in. The routes of containers and
    of other cells' subnets are longer and win.
    """
    with Netlink() as netlink:
        ours = [route for route in (read_route(*each) for each in netlink.dump(*routes())) if route is not None]
        actual = {route.prefix for route in ours if route.gateway is None}
        netlink.run(*(replace_unreachable(prefix) for prefix in prefixes - actual))
        netlink.run(*(delete_unreachable(prefix) for prefix in actual - prefixes))
        return actual != prefixes
