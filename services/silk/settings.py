"""The settings of the silk worker and the Silk controller."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bus.decode import Malformed
from bus.messages import cell_name
from bus.settings import CellSettings, CentralSettings, setting
from services.silk.bandwidth import Bandwidth

OVERLAY = IPv4Network("10.255.0.0/16")
MAX_INTERFACE_NAME = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(CellSettings):
    """What a cell's silk worker needs to know."""

    underlay: IPv4Address = setting("this cell's IPv4 address on the underlay network")
    overlay_network: IPv4Network = setting("network of all containers; the controller's must be the same", OVERLAY)
    vni: int = setting("VXLAN network identifier", 1)
    vtep_port: int = setting("UDP port of VXLAN on every cell", 4789)
    vtep_name: str = setting("name of this cell's VXLAN device", "silk-vtep")
    mtu: int = setting("MTU of the overlay and the containers; 0 is the underlay device's less 50", 0)
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
        if self.underlay in self.overlay_network:
            raise Malformed(f"underlay: {self.underlay} lies in the overlay network {self.overlay_network}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings(CentralSettings):
    """What the Silk controller needs to know."""

    database: str = setting("database of the leases: sqlite:///FILE, postgresql://… or mysql://…", "sqlite:///silk.db")
    overlay_network: IPv4Network = setting("network of all containers", OVERLAY)
    subnet_prefix_length: int = setting("length of the prefix of each cell's subnet; fixed once cells have leases", 24)
    lease_expiry: int = setting("seconds after which a lease that is not renewed may go to another cell", 7 * 86400)
    run_dir: Path = setting("folder of the service's socket", Path("/run/silkbus"))

    def __post_init__(self) -> None:
        CentralSettings.__post_init__(self)
        if not self.overlay_network.prefixlen < self.subnet_prefix_length <= 30:
            raise Malformed(
                f"subnet_prefix_length: must be longer than that of {self.overlay_network} and at most 30,"
                f" not {self.subnet_prefix_length}"
            )
        if self.lease_expiry < 4:
            raise Malformed(f"lease_expiry: must be at least 4 s, not {self.lease_expiry}")

    @property
    def socket(self) -> Path:
        return self.run_dir / "silk-controller" / "silk-controller.sock"
