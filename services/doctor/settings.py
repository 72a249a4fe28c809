"""What the doctor must know of its cell: the settings of its services that say where things are."""

from dataclasses import dataclass
from ipaddress import IPv4Network

from bus.settings import CellSettings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings(CellSettings):
    """Names and defaults are the services'; so their files can be given to --config."""

    cell: str = setting("name of this cell, by which NATS knows it; without, the bus is not looked at", "")
    api: str = setting("URL of the policy server, whose clock is compared with ours", "")
    overlay_network: tuple[IPv4Network, ...] = setting("the networks of the overlay", (IPv4Network("10.255.0.0/16"),))
    vtep_name: str = setting("name of the VXLAN device", "silk-vtep")
    vtep_port: int = setting("UDP port of VXLAN", 4789)
    link_prefix: str = setting("how the host ends of containers' links begin", "s-")
    iptables: str = setting("auto, legacy or nft", "auto")
