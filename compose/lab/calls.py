"""HTTP calls of the lab: to the services' private sockets, and to the gateway with the time of its answer."""

import http.client
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 10.0
POLICIES = "/networking/v1/external/policies"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get(path: Path, target: str, *, timeout: float = TIMEOUT) -> tuple[int, str]:
    """GET `target` from the service at a Unix socket: status and text. Raises OSError, also for no answer."""
    return _answer(_UnixConnection(path, timeout), "GET", target)


def get_tcp(port: int, target: str, *, timeout: float = TIMEOUT) -> tuple[int, str]:
    """GET `target` from the loopback port `port`: status and text. Raises OSError, also for no answer."""
    return _answer(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout), "GET", target)


def _answer(connection: http.client.HTTPConnection, method: str, target: str) -> tuple[int, str]:
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{method} {target}: {error!r}") from error
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Change:
    """A change that the gateway accepted. Times are of CLOCK_MONOTONIC: asked, and its answer read."""

    revision: int
    asked: float
    answered: float


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy between two apps, by their GUIDs."""

    source: str
    destination: str
    start: int
    end: int
    protocol: str = "tcp"

    def encode(self) -> dict[str, Any]:
        ports = {"start": self.start, "end": self.end}
        return {
            "source": {"id": self.source},
            "destination": {"id": self.destination, "protocol": self.protocol, "ports": ports},
        }


class GatewayError(Exception):
    """The gateway refused a call; the text is its answer."""


class Gateway:
    """The policy server's external API."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token

    def add(self, *rules: Rule) -> Change:
        return self._change(POLICIES, rules)

    def remove(self, *rules: Rule) -> Change:
        return self._change(POLICIES + "/delete", rules)

    def revision(self) -> int:
        """The current revision: that of a removal of what nobody has, which changes nothing."""
        return self.remove(Rule("no-such-app", "no-such-app", 1, 1)).revision

    def _change(self, path: str, rules: Sequence[Rule]) -> Change:
        body = json.dumps({"policies": [rule.encode() for rule in rules]})
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        try:
            connection.connect()  # before the clock starts: the time is the server's
            asked = time.monotonic()
            connection.request("POST", path, body, {"Authorization": f"Bearer {self._token}"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            answered = time.monotonic()
        except http.client.HTTPException as error:
            raise ConnectionError(f"POST {path}: {error!r}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise GatewayError(f"POST {path}: {response.status}: {text}")
        return Change(int(response.headers["X-Silkbus-Revision"]), asked, answered)
