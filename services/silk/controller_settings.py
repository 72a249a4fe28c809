"""The settings of the Silk controller. Keys that the original's configuration has, too, are named as there."""

import ssl
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from bus.decode import Malformed
from bus.listener import ADDRESS
from bus.settings import CentralSettings, setting
from bus.tls_server import mutual_tls
from services.silk.pool import Pool
from services.silk.settings import OVERLAY


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings(CentralSettings):
    """What the Silk controller needs to know."""

    database: str = setting("database of the leases: sqlite:///FILE, postgresql://… or mysql://…", "sqlite:///silk.db")
    overlay_network: tuple[IPv4Network, ...] = setting(
        "networks that subnets are cut from, comma-separated; more may be added at any time", (OVERLAY,)
    )
    subnet_prefix_length: int = setting("length of the prefix of each cell's subnet; fixed once cells have leases", 24)
    lease_expiry: int = setting("seconds after which a lease that is not renewed ends", 7 * 86400)
    subnet_rest: int = setting("seconds before a subnet that was released or expired goes to another cell", 600)
    lease_grace: int = setting("seconds that renewals must have been heard before any lease is ended", 120)
    max_overdue_share: float = setting("share of the leases, 0 to 1, of which more are not let expire at once", 0.2)
    listen: str = setting("where cells of the original lease over mutual TLS: HOST:PORT; empty for nowhere", "")
    ca_cert_file: Path | None = setting("certificates of the authorities of those cells, with listen", None)
    server_cert_file: Path | None = setting("the controller's certificate for them, with listen", None)
    server_key_file: Path | None = setting("private key of server_cert_file", None)
    health_check_port: int = setting("port of loopback where /health, /readyz and /metrics are answered; 0 for none", 0)
    debug_listen: str = setting("where the log level can be set at run time: HOST:PORT; empty for nowhere", "")
    run_dir: Path = setting("folder of the service's socket", Path("/run/silkbus"))

    def __post_init__(self) -> None:
        CentralSettings.__post_init__(self)
        _ = self.pool  # checks it
        if self.lease_expiry < 4:
            raise Malformed(f"lease_expiry: must be at least 4 s, not {self.lease_expiry}")
        for name in ("subnet_rest", "lease_grace"):
            if getattr(self, name) < 0:
                raise Malformed(f"{name}: must not be negative, as {getattr(self, name)} is")
        if not 0 <= self.max_overdue_share <= 1:
            raise Malformed(f"max_overdue_share: must be in 0..1, not {self.max_overdue_share:g}")
        for name in ("listen", "debug_listen"):
            if getattr(self, name) and not ADDRESS.fullmatch(getattr(self, name)):
                raise Malformed(f"{name}: {getattr(self, name)!r} is neither HOST:PORT nor fd:N")
        if not 0 <= self.health_check_port <= 65535:
            raise Malformed(f"health_check_port: must be in 0..65535, not {self.health_check_port}")
        if self.listen and None in (self.ca_cert_file, self.server_cert_file, self.server_key_file):
            raise Malformed("ca_cert_file, server_cert_file, server_key_file: required with listen")

    @property
    def pool(self) -> Pool:
        """Raises Malformed."""
        return Pool(self.overlay_network, self.subnet_prefix_length)

    def tls(self) -> ssl.SSLContext | None:
        """Mutual TLS with cells of the original; None without `listen`. Raises Malformed for unusable files."""
        if self.server_cert_file is None or self.server_key_file is None or self.ca_cert_file is None:
            return None
        return mutual_tls(self.server_cert_file, self.server_key_file, self.ca_cert_file)

    @property
    def socket(self) -> Path:
        return self.run_dir / "silk-controller" / "silk-controller.sock"
