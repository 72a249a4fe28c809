"""How a SQL database is connected to: TLS, time-outs, how many connections. Settings name these; drivers differ."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from bus.decode import Malformed

TLS = ("off", "encrypt", "verify-ca", "verify")
"""Never; whoever answers (an eavesdropper is kept out, an impostor is not); whom the authority vouches for, by any
name; whom the authority vouches for by the name in the URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseOptions:
    """All times are in seconds. SQLite has no use for any of them."""

    tls: str = "off"
    ca: Path | None = None
    """PEM file of the authorities to trust; None for those of the system."""
    connect_timeout: float = 5.0
    """For a connection, also when it has to be waited for since all are in use."""
    statement_timeout: float = 10.0
    """For the answer to one statement, waits for locks included; the server is told, and gives up, too."""
    connections: int = 10
    """The most at once, for each process."""
    connection_lifetime: float = 300.0
    """How long a connection may lie idle before it is closed."""
    newer_schema: bool = False
    """Whether to go on with a schema that has steps unknown here. They only add, so those of the next version do."""

    def __post_init__(self) -> None:
        if self.tls not in TLS:
            raise Malformed(f"database_tls: {self.tls!r} is not one of {', '.join(TLS)}")
        if self.ca is not None and not self.tls.startswith("verify"):
            raise Malformed(f"database_ca: is of no use with database_tls {self.tls!r}; set that to verify")
        for name in ("connect_timeout", "statement_timeout", "connection_lifetime"):
            if not 0 < getattr(self, name) <= 86_400:
                raise Malformed(f"database_{name}: must be more than 0 and at most 86400, not {getattr(self, name):g}")
        if self.connections < 2:
            raise Malformed(f"database_connections: must be at least 2 (one writes), not {self.connections}")

    def tls_context(self) -> ssl.SSLContext | None:
        """What drivers take; None without TLS. Raises Malformed for a `ca` that cannot be used."""
        if self.tls == "off":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # ssl.SSLError is one
            raise Malformed(f"database_ca: {self.ca}: not a readable PEM file of certificates ({error})") from None
        context.check_hostname = self.tls == "verify"
        if self.tls == "encrypt":
            context.verify_mode = ssl.CERT_NONE
        return context
