"""A real policy server of a test's own: its process, database, tokens and a client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ADMIN_TOKEN = "an-admin's-token"  # noqa: S105
WRITE_TOKEN = "a-developer's-token"  # noqa: S105
READER_TOKEN = "a-reader's-token"  # noqa: S105
TOKENS = {
    "tokens": [
        {"token": ADMIN_TOKEN, "user": "admin", "scopes": ["network.admin"]},
        {"token": WRITE_TOKEN, "user": "dev", "scopes": ["network.write", "openid"]},
        {"token": READER_TOKEN, "user": "reader", "scopes": ["a", "b"]},
    ]
}
NOWHERE = "nats://127.0.0.1:9"
POLICIES = "/networking/v1/external/policies"
DELETE = "/networking/v1/external/policies/delete"


def policy(source: str, destination: str, start: int = 8080, end: int | None = None, protocol: str = "tcp") -> Any:
    ports = {"start": start, "end": start if end is None else end}
    return {"source": {"id": source}, "destination": {"id": destination, "protocol": protocol, "ports": ports}}


def body(*policies: Any) -> dict[str, Any]:
    return {"policies": list(policies)}


class PolicyServer:
    """The server's process. It inherits its listening socket, so a client may call before it is up."""

    def __init__(self, folder: Path, nats: str = NOWHERE, **settings: object) -> None:
        self.folder = folder
        self.nats = nats
        self.settings = {f"SILKBUS_{name.upper()}": str(value) for name, value in settings.items()}
        self.tokens = folder / "tokens.json"
        self.tokens.write_text(json.dumps(TOKENS))
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def database(self) -> str:
        return f"sqlite:///{self.folder / 'policy.db'}"

    def start(self, failpoints: str = "", *, ready: Callable[[], object] | None = None) -> None:
        """Start it, and return when `ready`, by default GET /livez, succeeds."""
        settings = {
            "SILKBUS_DATABASE": self.database,
            "SILKBUS_LISTEN": f"fd:{self.listener.fileno()}",
            "SILKBUS_TOKENS": str(self.tokens),
            "SILKBUS_NATS": self.nats,
            "SILKBUS_FAILPOINTS": failpoints,
            **self.settings,
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.policy.server"],
                env={**os.environ, **settings},
                stderr=log,
                pass_fds=[self.listener.fileno()],
            )
        self._wait_until_up(ready or (lambda: httpx.get(f"{self.url}/livez", timeout=1)))

    def _wait_until_up(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                ready()
            except httpx.HTTPError:
                time.sleep(0.02)
            else:
                return
        raise TimeoutError(self.log)

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def wait_killed(self) -> None:
        assert self.process is not None
        assert self.process.wait(30) == -signal.SIGKILL

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.listener.close()

    def client(self, token: str = ADMIN_TOKEN) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"bearer {token}"}, timeout=60, trust_env=False
        )
