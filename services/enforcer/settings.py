"""The enforcer's settings. Names of links and the overlay must equal the Silk worker's, or nothing is enforced."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Literal

from bus.decode import Malformed
from bus.settings import setting
from services.enforcer.traffic_settings import TrafficSettings

Kind = Literal["legacy", "nft"]
"""Which of the kernel's two packet filters: xtables ("legacy") or nf_tables by way of iptables-nft ("nft")."""

_LINK = re.compile(r"[A-Za-z0-9_.-]{1,15}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnforcerSettings(TrafficSettings):
    overlay_network: IPv4Network = setting("the whole overlay", IPv4Network("10.255.0.0/16"))
    vtep_name: str = setting("name of the VXLAN device", "silk-vtep")
    vtep_port: int = setting("UDP port of VXLAN", 4789)
    link_prefix: str = setting("how the host ends of containers' links begin", "s-")
    iptables: str = setting("auto, legacy or nft", "auto")
    unmarked_answers: bool = setting(
        "take answers that their cell did not mark: true only while cells of the original Silk are in the fleet", False
    )

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a second class, which the zero-argument form does not know.
        TrafficSettings.__post_init__(self)
        if self.iptables not in ("auto", "legacy", "nft"):
            raise Malformed(f"iptables: {self.iptables!r} is not one of auto, legacy, nft")
        if not 1 <= self.vtep_port <= 65535:
            raise Malformed(f"vtep_port: must be in 1..65535, not {self.vtep_port}")
        for name, value, longest in (("vtep_name", self.vtep_name, 15), ("link_prefix", self.link_prefix, 14)):
            if not _LINK.fullmatch(value) or len(value) > longest:
                raise Malformed(f"{name}: {value!r} must be 1 to {longest} letters, digits, '.', '_' or '-'")
        if self.vtep_name.startswith(self.link_prefix):
            raise Malformed(
                f"vtep_name: {self.vtep_name!r} must not begin as containers' links do, {self.link_prefix!r}"
            )
