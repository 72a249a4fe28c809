"""A real internal API's server of a test's own: its process, certificates and clients."""

import os
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx

from bus.certificates import Authority
from tests.nats_server import free_port
from tests.policy.server import NOWHERE

INTERNAL = "/networking/v1/internal"


class InternalServer:
    """The server's process over a database, and the authority of its own certificate and its clients'."""

    def __init__(self, folder: Path, database: str, nats: str = NOWHERE, **settings: object) -> None:
        self.folder = folder
        self.port, self.health_port = free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.authority = Authority(folder / "authority", "internal")
        self.authority.ensure()
        for name, usage in (("server", "serverAuth"), ("agent", "clientAuth")):
            certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
            self.authority.issue(certificate, key, names=["IP:127.0.0.1"], usage=usage)
        self.settings = {
            "ca_cert_file": self.authority.certificate,
            "server_cert_file": folder / "server.crt",
            "server_key_file": folder / "server.key",
            "listen_host": "127.0.0.1",
            "internal_listen_port": self.port,
            "health_check_port": self.health_port,
            "database": database,
            "nats": nats,
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        """Start it with its settings, or with these arguments in place of them but the bus."""
        settings = {"nats": self.settings["nats"]} if arguments else self.settings
        environment = {f"SILKBUS_{name.upper()}": str(value) for name, value in settings.items()}
        with (self.folder / "internal.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.policy.internal_server", *arguments],
                env={**os.environ, **environment},
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            try:
                if httpx.get(f"http://127.0.0.1:{self.health_port}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.02)

    @property
    def log(self) -> str:
        return (self.folder / "internal.log").read_text()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def tls(self, *, certificate: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        if certificate:
            context.load_cert_chain(self.folder / "agent.crt", self.folder / "agent.key")
        return context

    def client(self, *, certificate: bool = True) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.tls(certificate=certificate), timeout=30, trust_env=False)

    def rendered(self, database: dict[str, object]) -> dict[str, object]:
        """The original's configuration file for this server, as BOSH renders it (contract/policy.md 2.1)."""
        return {
            "log_prefix": "cfnetworking",
            "listen_host": "127.0.0.1",
            "internal_listen_port": self.port,
            "debug_server_host": "127.0.0.1",
            "debug_server_port": free_port(),
            "health_check_port": self.health_port,
            "ca_cert_file": str(self.authority.certificate),
            "server_cert_file": str(self.folder / "server.crt"),
            "server_key_file": str(self.folder / "server.key"),
            "database": database,
            "tag_length": 3,
            "metron_address": "127.0.0.1:3457",
            "log_level": "error",
            "max_idle_connections": 10,
            "max_open_connections": 200,
            "connections_max_lifetime_seconds": 3600,
        }
