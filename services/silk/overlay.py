"""This cell's VXLAN device, in the form of contract/cell.md 5.3, so that cells of the original Silk understand it.

The device belongs to the lease, not to the process: it stays when the worker ends, and is made anew only if what
cannot be changed in place is not as it must be. A restart therefore loses no packet.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
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

    network: IPv4Network
    underlay: IPv4Address
    vni: int
    port: int
    name: str
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """The device as it stands: its index in this namespace, and its MTU, which is the containers' too."""

    index: int
    mtu: int


def ensure(overlay: Overlay, lease: Lease) -> Device:
    """Make the device exactly as it must be for this lease, changing no more than is needed, and set it up.

    Blocks. Works in the network namespace of the calling thread. Raises OverlayError or OSError.
    """
    with _explained(overlay.name), IPRoute() as ipr:
        parent = _parent(ipr, overlay)
        mtu = overlay.mtu or parent.get_attr("IFLA_MTU") - VXLAN_OVERHEAD
        link = _link(ipr, overlay.name)
        if link is not None and (reason := _unlike(link, overlay, lease, parent["index"])):
            _refuse_foreign(link, overlay)
            log.warning("replacing the overlay device", extra=about(device=overlay.name, reason=reason))
            ipr.link("del", index=link["index"])
            link = None
        if link is None:
            log.info("creating the overlay device", extra=about(device=overlay.name, subnet=str(lease.subnet), mtu=mtu))
            link = _create(ipr, overlay, lease, parent["index"], mtu)
        index: int = link["index"]
        if link.get_attr("IFLA_MTU") != mtu:
            ipr.link("set", index=index, mtu=mtu)
        if not link["flags"] & UP:
            ipr.link("set", index=index, state="up")
        _ensure_address(ipr, index, lease.subnet.network_address, overlay.network.prefixlen)
    _ensure_unreachable(lease.subnet)
    return Device(index, mtu)


def fence(name: str) -> None:
    """Set the device down: this cell neither sends nor takes anything over the overlay. No device is no error."""
    with _explained(name), IPRoute() as ipr:
        link = _link(ipr, name)
        if link is not None and link["flags"] & UP:
            ipr.link("set", index=link["index"], state="down")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise OverlayError(f"the kernel refused to set up the overlay device {name}: {error}") from error


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


def _ensure_address(ipr: IPRoute, index: int, base: IPv4Address, prefix_length: int) -> None:
    """The subnet's base address with the overlay's prefix, scope link, and no other IPv4 address."""
    right = False
    for address in ipr.get_addr(index=index, family=2):
        has = (address.get_attr("IFA_LOCAL"), address["prefixlen"], address["scope"])
        if has == (str(base), prefix_length, SCOPE_LINK):
            right = True
        else:
            ipr.addr("del", index=index, address=has[0], prefixlen=has[1])
    if not right:
        ipr.addr("add", index=index, address=str(base), prefixlen=prefix_length, scope=SCOPE_LINK)


def _ensure_unreachable(subnet: IPv4Network) -> None:
    """Packets to addresses of our own subnet that no container has end here, not in the overlay.

    A container's own /32 route is longer and wins.
    """
    with Netlink() as netlink:
        ours = [route for route in (read_route(*each) for each in netlink.dump(*routes())) if route is not None]
        stale = [route.prefix for route in ours if route.gateway is None and route.prefix != subnet]
        if not any(route.gateway is None and route.prefix == subnet for route in ours):
            netlink.run(replace_unreachable(subnet))
        netlink.run(*(delete_unreachable(prefix) for prefix in stale))
