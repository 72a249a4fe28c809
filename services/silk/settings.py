"""The settings of the silk worker."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bus.decode import Malformed
from bus.messages import cell_name
from bus.settings import CellSettings, setting
from services.silk.bandwidth import Bandwidth

OVERLAY = IPv4Network("10.255.0.0/16")
MAX_INTERFACE_NAME = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(CellSettings):
    """What a cell's silk worker needs to know."""

    underlay: IPv4Address = setting("this cell's IPv4 address on the underlay network")
    overlay_network: tuple[IPv4Network, ...] = setting("networks of all containers, as the controller's", (OVERLAY,))
    vni: int = setting("VXLAN network identifier", 1)
    vtep_port: int = setting("UDP port of VXLAN on every cell", 4789)
    vtep_name: str = setting("name of this cell's VXLAN device", "silk-vtep")
    mtu: int = setting("MTU of the overlay and the containers; 0 is the underlay device's less 50", 0)
    single_ip_only: bool = setting("lease one overlay address instead of a subnet: a machine without containers", False)
    controller_url: str = setting("URL of the original's Silk controller, to be used instead of ours on the bus", "")
    controller_ca: Path | None = setting("certificate of the authority that the original's controller must have", None)
    controller_cert: Path | None = setting("this cell's certificate for the original's controller", None)
    controller_key: Path | None = setting("private key of controller_cert", None)
    partition_tolerance: int = setting(
        "seconds to go on without the original's controller; at most its lease expiry", 7 * 86400
    )
    health_port: int = setting(
        "port on 127.0.0.1 that answers as the original's silk-daemon does, to its CNI; 0 is none", 0
    )
    bandwidth_rate: int = setting("Kbit/s that each container may receive, and send; 0 is no limit", 0)
    bandwidth_burst: int = setting("Kb that each container may receive or send at once; needs bandwidth_rate", 0)

    def __post_init__(self) -> None:
        # slots make the zero-argument super() of a dataclass mean the class before it was rebuilt.
        CellSettings.__post_init__(self)
        cell_name(self.cell)
        if not 0 < self.vni < 1 << 24:
            raise Malformed(f"vni: must be 1 to 16777215, not {self.vni}")
        if not 0 < self.vtep_port < 65536:
            raise Malformed(f"vtep_port: must be 1 to 65535, not {self.vtep_port}")
        if not 0 < len(self.vtep_name) <= MAX_INTERFACE_NAME:
            raise Malformed(f"vtep_name: must have 1 to {MAX_INTERFACE_NAME} characters: {self.vtep_name!r}")
        _ = Bandwidth.both_ways(self.bandwidth_rate, self.bandwidth_burst)  # checks them
        if self.mtu and not 576 <= self.mtu <= 65535:
            raise Malformed(f"mtu: must be 0 or 576 to 65535, not {self.mtu}")
        if not self.overlay_network:
            raise Malformed("overlay_network: name at least one network")
        if not 0 <= self.health_port < 65536:
            raise Malformed(f"health_port: must be 0 to 65535, not {self.health_port}")
        if self.controller_url:
            if not self.controller_url.startswith("https://"):
                raise Malformed(f"controller_url: must begin with https://, not {self.controller_url!r}")
            if self.controller_ca is None or self.controller_cert is None or self.controller_key is None:
                raise Malformed("controller_url: set controller_ca, controller_cert and controller_key, too")
            if self.partition_tolerance < 4:
                raise Malformed(f"partition_tolerance: must be at least 4 s, not {self.partition_tolerance}")
        for network in self.overlay_network:
            if self.underlay in network:
                raise Malformed(f"underlay: {self.underlay} lies in the overlay network {network}")
