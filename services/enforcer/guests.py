"""Links of containers that another CNI plugin attached: made known to the rules by a device group.

Rules know our own links by the beginning of their names. Another plugin's may be called anything, and new ones must not
need rules of their own, which every packet would pass. So the device by which a container's address is reached (its
own link, or the bridge that it is on) is put into the group that rules ask for (`ip link set … group`).

What a bridge passes between two of its own ports never meets the rules, unless br_netfilter is on; and on a bridge a
container can use the address of another one there. Both are the plugin's to prevent. Until it is admitted a container
can send unhindered, so its runtime must not start it before.
"""

import errno
import logging
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bus.log import about
from bus.messages import Handle
from services.enforcer.rules import GUESTS

log = logging.getLogger(__name__)

_UNICAST = 1  # RTN_UNICAST


class NoGuest(Exception):
    """The link of a container cannot be told. The text says why, and what to do."""


def adopt(
    guests: Mapping[Handle, IPv4Address], prefix: str, vtep: str, underlay: IPv4Address | None
) -> dict[str, str | None]:
    """Put the links of these containers into the group: handle -> why that cannot be, or None.

    Links that begin with `prefix` need none. The devices that lead to the world (the VTEP, that of a default route,
    that with the `underlay` address) are never taken for a container's: the fence would cut the host off. Raises
    OSError.
    """
    if not guests:
        return {}
    problems: dict[str, str | None] = {}
    with IPRoute() as netlink:
        uplinks = _uplinks(netlink, underlay)
        for handle, address in guests.items():
            try:
                _adopt(netlink, address, prefix, vtep, uplinks)
                problems[str(handle)] = None
            except NoGuest as problem:
                problems[str(handle)] = f"container {handle!r} at {address}: {problem}"
    return problems


def _uplinks(netlink: IPRoute, underlay: IPv4Address | None) -> set[int]:
    uplinks = {route.get_attr("RTA_OIF") for route in netlink.get_default_routes(family=2)}
    if underlay is not None:
        uplinks |= {address["index"] for address in netlink.get_addr(family=2, address=str(underlay))}
    return uplinks


def _adopt(netlink: IPRoute, address: IPv4Address, prefix: str, vtep: str, uplinks: set[int]) -> None:
    try:
        route: Any = netlink.route("get", dst=str(address))[0]
    except NetlinkError as error:
        if error.code not in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
            raise
        raise NoGuest(f"there is no route to it ({error}); its CNI plugin must make one") from None
    index = route.get_attr("RTA_OIF")
    link: Any = netlink.get_links(index)[0]
    name = link.get_attr("IFLA_IFNAME")
    if name.startswith(prefix):
        return
    if route["type"] != _UNICAST or route.get_attr("RTA_GATEWAY") is not None or name == vtep or index in uplinks:
        raise NoGuest(
            f"it is reached by way of {name}, which is no container's link;"
            " use a CNI plugin that gives containers a link or a bridge of their own (ptp, bridge)"
        )
    if link.get_attr("IFLA_GROUP") != GUESTS:
        netlink.link("set", index=index, group=GUESTS)
        log.info("a link of another CNI plugin is fenced", extra=about(interface=name, address=str(address)))
