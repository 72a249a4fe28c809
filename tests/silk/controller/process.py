"""A real controller of a test's own: its process, its API over mutual TLS, and its health check."""

import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from bus.certificates import Authority
from tests.nats_server import free_port

NOWHERE = "nats://127.0.0.1:9"


class ControllerProcess:
    """One controller on a database. `name` tells several in one folder apart."""

    def __init__(self, folder: Path, database: str, nats: str = NOWHERE, name: str = "one", **settings: object) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.port, self.health_port = free_port(), free_port()
        self.url, self.health = f"https://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.health_port}"
        self.authority = Authority(self.folder / "authority", "silk")
        self.authority.ensure()
        for what, usage in (("server", "serverAuth"), ("daemon", "clientAuth")):
            certificate, key = self.folder / f"{what}.crt", self.folder / f"{what}.key"
            self.authority.issue(certificate, key, names=["IP:127.0.0.1"], usage=usage)
        self.settings = {
            "listen": f"127.0.0.1:{self.port}",
            "ca_cert_file": self.authority.certificate,
            "server_cert_file": self.folder / "server.crt",
            "server_key_file": self.folder / "server.key",
            "health_check_port": self.health_port,
            "database": database,
            "nats": nats,
            "run_dir": self.folder,
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, *arguments: str, **settings: object) -> None:
        environment = {f"SILKBUS_{name.upper()}": str(value) for name, value in (self.settings | settings).items()}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.silk.controller", *arguments],
                env={**os.environ, **environment},
                stderr=log,
            )

    def start(self, **settings: object) -> None:
        """Start it, and return when its API answers."""
        self.launch(**settings)
        self.wait_until(lambda: httpx.get(f"{self.health}/livez", timeout=5, trust_env=False).status_code == 200)

    def wait_until(self, condition: Any, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                if condition():
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def ready(self) -> tuple[int, str]:
        answer = httpx.get(f"{self.health}/readyz", timeout=10, trust_env=False)
        return answer.status_code, answer.text

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def tls(self, *, certificate: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        if certificate:
            context.load_cert_chain(self.folder / "daemon.crt", self.folder / "daemon.key")
        return context

    def client(self, *, certificate: bool = True) -> httpx.Client:
        """What the original's daemon is to it."""
        return httpx.Client(base_url=self.url, verify=self.tls(certificate=certificate), timeout=60, trust_env=False)
