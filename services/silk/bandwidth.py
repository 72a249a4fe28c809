"""Limits of a container's bandwidth, by token bucket filters on the host's side of its link.

Forms and sizes are those of the CNI bandwidth plugin that the original runs (contract/cell.md 3.6). What the container
receives leaves the host by its link, so a filter there limits it. What it sends arrives by the link, where nothing can
be queued: it is redirected through an intermediate device (ifb) that has such a filter.

The ifb carries the container's handle as its alias, as the link does. So those that a crash or a vanished namespace
left behind are known for ours, and other people's are not touched.
"""

import hashlib
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from bus.decode import Fields, Malformed
from bus.log import about
from bus.messages import Handle

log = logging.getLogger(__name__)

LATENCY = "25ms"
KILO = 1024
"""The original's settings are in Kbit/s and Kb of 1024 bits."""
MAX_RATE = 8 * (2**32 - 1)
"""Bits a second that the filter's rate, bytes in 32 bits, can say."""
_FRAME = 14
_ROOT, _INGRESS, _ANY_PROTOCOL = 0x10000, 0xFFFF0000, 3
_IFB_NAME = re.compile(r"bwp[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `rate` bits a second, after `burst` bits at once."""

    rate: int
    burst: int


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The limits of what a container receives (ingress) and sends (egress); None is none."""

    ingress: Limit | None = None
    egress: Limit | None = None

    def encode(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, limit in (("ingress", self.ingress), ("egress", self.egress)):
            if limit is not None:
                found |= {f"{name}Rate": limit.rate, f"{name}Burst": limit.burst}
        return found

    @classmethod
    def decode(cls, value: object, where: str = "bandwidth") -> "Bandwidth":
        """The form of CNI's capability `bandwidth`: bits a second and bits; 0 or absent is no limit."""
        fields = Fields(value, where)
        return cls(_limit(fields, "ingress"), _limit(fields, "egress"))

    @classmethod
    def both_ways(cls, rate: int, burst: int) -> "Bandwidth":
        """The settings `bandwidth_rate` (Kbit/s) and `bandwidth_burst` (Kb), alike in both directions."""
        limit = make_limit(rate * KILO, burst * KILO, "bandwidth")
        return cls(limit, limit)

    def check(self, mtu: int) -> None:
        """Raise Malformed if a limit would let no packet of `mtu` bytes through, however long it waits."""
        for name, limit in (("ingress", self.ingress), ("egress", self.egress)):
            if limit is not None and limit.burst < 8 * (mtu + _FRAME):
                raise Malformed(
                    f"bandwidth: the burst of {name}, {limit.burst} bits, is less than one packet of {mtu} bytes, which"
                    f" would never pass: set at least {8 * (mtu + _FRAME)} bits"
                )


UNLIMITED = Bandwidth()


def make_limit(rate: int, burst: int, where: str) -> Limit | None:
    """A limit, or None if both are 0. Raises Malformed, in the words of the CNI plugin."""
    if rate and not burst:
        raise Malformed(f"{where}: if rate is set, burst must also be set")
    if burst and not rate:
        raise Malformed(f"{where}: if burst is set, rate must also be set")
    if rate > MAX_RATE or burst > MAX_RATE:
        raise Malformed(f"{where}: rate and burst must be at most {MAX_RATE} bits, not {max(rate, burst)}")
    if rate and rate < 8:
        raise Malformed(f"{where}: the rate must be at least 8 bits a second, not {rate}")
    return Limit(rate, burst) if rate else None


def _limit(fields: Fields, name: str) -> Limit | None:
    rate, burst = (fields.integer(f"{name}{what}") if f"{name}{what}" in fields else 0 for what in ("Rate", "Burst"))
    return make_limit(rate, burst, f"{fields.where}: {name}")


def ifb_name(handle: Handle) -> str:
    """`bwp` and 12 digits of a hash; `silk` is the network's name in the original's configuration."""
    return "bwp" + hashlib.sha512(b"silk" + handle.encode()).hexdigest()[:12]


def limit_link(index: int, handle: Handle, bandwidth: Bandwidth, mtu: int) -> None:
    """Put the limits on the host's end `index` of a new link. Blocks. Raises OSError, with the kernel's reason."""
    with _explained(handle), IPRoute() as ipr:
        if bandwidth.ingress is not None:
            _add_filter(ipr, index, bandwidth.ingress)
        if bandwidth.egress is not None:
            name = ifb_name(handle)
            for left in ipr.link("dump", ifname=name):
                ipr.link("del", index=left["index"])
            ipr.link("add", ifname=name, kind="ifb", mtu=mtu)
            ifb = next(iter(ipr.link("dump", ifname=name)))["index"]
            ipr.link("set", index=ifb, ifalias=handle)
            ipr.link("set", index=ifb, state="up")
            _add_filter(ipr, ifb, bandwidth.egress)
            ipr.tc("add", "ingress", index)
            redirect = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": ifb}
            ipr.tc(
                "add-filter",
                "u32",
                index,
                parent=_INGRESS,
                prio=1,
                protocol=_ANY_PROTOCOL,
                target=_ROOT,
                keys=["0x0/0x0+0"],
                action=redirect,
            )


def remove_ifbs(keep: Collection[Handle]) -> int:
    """Remove our ifbs of all containers but these; how many. Blocks. Raises OSError."""
    removed = 0
    with _explained(Handle("")), IPRoute() as ipr:
        for link in ipr.link("dump", kind="ifb"):
            name, owner = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_IFALIAS")
            if _IFB_NAME.fullmatch(name) and owner and owner not in keep:
                log.info("removing a bandwidth device", extra=about(device=name, handle=owner))
                ipr.link("del", index=link["index"])
                removed += 1
    return removed


def _add_filter(ipr: IPRoute, index: int, limit: Limit) -> None:
    ipr.tc("add", "tbf", index, handle=_ROOT, rate=limit.rate // 8, burst=limit.burst // 8, latency=LATENCY)


@contextmanager
def _explained(handle: Handle) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise OSError(
            error.code,
            f"the kernel refused to limit the bandwidth of {handle!r}: {error}; it needs the modules sch_tbf,"
            " sch_ingress, cls_u32, act_mirred and ifb",
        ) from error
