"""The settings of the internal API's server, named as in the original's configuration where they are there, too."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from bus.decode import Malformed
from bus.settings import CentralSettings, setting
from bus.tls_server import mutual_tls


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalSettings(CentralSettings):
    """Settings of silkbus-policy-server-internal."""

    ca_cert_file: Path = setting("certificates of the authority that clients' certificates must be of")
    server_cert_file: Path = setting("the API's certificate")
    server_key_file: Path = setting("private key of server_cert_file")
    listen_host: str = setting("address at which the API listens", "0.0.0.0")  # noqa: S104 (as the contract has it)
    internal_listen_port: int = setting("port of the API, mutual TLS", 4003)
    health_check_port: int = setting("port of the health check on loopback, plain HTTP", 31946)
    debug_server_host: str = setting("address where the log level can be set at run time", "127.0.0.1")
    debug_server_port: int = setting("port for that; 0 for nowhere", 0)
    database: str = setting("SQL database, as a URL: that of the policy server", "sqlite:///policy.db")
    tag_length: int = setting("bytes with which tags are written: 1, 2 or 3; as the policy server's", 2)
    max_stale: int = setting("seconds a cell may act on its last known state; as the policy server's", 604_800)

    def __post_init__(self) -> None:
        # Named, since a dataclass with slots is made anew and has not the class that super() would look for.
        CentralSettings.__post_init__(self)
        for name, least in (("internal_listen_port", 1), ("health_check_port", 1), ("debug_server_port", 0)):
            if not least <= getattr(self, name) <= 65535:
                raise Malformed(f"{name}: must be in {least}..65535, not {getattr(self, name)}")
        if self.max_stale < 0:
            raise Malformed(f"max_stale: must not be negative, as {self.max_stale} is")
        if not 1 <= self.tag_length <= 3:
            raise Malformed(f"tag_length: must be greater than 0 and less than 4, not {self.tag_length}")

    def tls(self) -> ssl.SSLContext:
        """Mutual TLS with these files. Raises Malformed for files that cannot be used."""
        return mutual_tls(self.server_cert_file, self.server_key_file, self.ca_cert_file)

    @property
    def listen(self) -> str:
        return f"{_host(self.listen_host)}:{self.internal_listen_port}"

    @property
    def debug_listen(self) -> str:
        return f"{_host(self.debug_server_host)}:{self.debug_server_port}" if self.debug_server_port else ""


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
