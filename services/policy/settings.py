"""The settings of the policy server. Keys that the original's configuration has, too, are named as there."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from bus.decode import Malformed
from bus.listener import ADDRESS, server_tls
from bus.messages import MAX_APP_ID
from bus.settings import setting
from services.policy.cors import Origins
from services.policy.gateway import Options
from services.policy.upkeep_settings import UpkeepSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings(UpkeepSettings):
    """Settings of the policy server."""

    database: str = setting("SQL database, as a URL", "sqlite:///policy.db")
    listen: str = setting("where the API listens: HOST:PORT, or fd:N for a socket inherited", "127.0.0.1:4002")
    enable_tls: bool = setting("serve the API over TLS", False)
    server_cert_file: Path | None = setting("the API's certificate, with enable_tls", None)
    server_key_file: Path | None = setting("private key of server_cert_file", None)
    allowed_cors_domains: tuple[str, ...] = setting("origins whose pages may read the API's answers; * for all", ())
    debug_listen: str = setting("where the log level can be set at run time, as listen; empty for nowhere", "")
    tag_length: int = setting("bytes with which tags are written: 1, 2 or 3; there are 65 535 tags all the same", 2)
    router_groups: tuple[str, ...] = setting("groups beside apps that have tags, as INGRESS_ROUTER", ())
    max_stale: int = setting("seconds a cell may act on its last known state; freed tags rest longer", 604_800)

    def __post_init__(self) -> None:
        # Named, since a dataclass with slots is made anew and has not the class that super() would look for.
        UpkeepSettings.__post_init__(self)
        if not ADDRESS.fullmatch(self.listen):
            raise Malformed(f"listen: {self.listen!r} is neither HOST:PORT nor fd:N")
        if self.debug_listen and not ADDRESS.fullmatch(self.debug_listen):
            raise Malformed(f"debug_listen: {self.debug_listen!r} is neither HOST:PORT nor fd:N")
        if self.max_stale < 0:
            raise Malformed(f"max_stale: must not be negative, as {self.max_stale} is")
        for group in self.router_groups:
            if not 1 <= len(group) <= MAX_APP_ID or not group.isprintable() or group != group.strip():
                raise Malformed(f"router_groups: {group!r} is not 1 to {MAX_APP_ID} printable characters")
        if not 1 <= self.tag_length <= 3:
            raise Malformed(f"tag_length: must be greater than 0 and less than 4, not {self.tag_length}")
        if self.enable_tls and (self.server_cert_file is None or self.server_key_file is None):
            raise Malformed("server_cert_file, server_key_file: required with enable_tls")

    def tls(self) -> ssl.SSLContext | None:
        """What the API is served with, None for plain HTTP. Raises Malformed for files that cannot be used."""
        if not self.enable_tls or self.server_cert_file is None or self.server_key_file is None:
            return None
        return server_tls(self.server_cert_file, self.server_key_file)

    @property
    def gateway_options(self) -> Options:
        return Options(
            max_policies=self.max_policies,
            tag_length=self.tag_length,
            origins=Origins(self.allowed_cors_domains),
            tls=self.enable_tls,
        )
