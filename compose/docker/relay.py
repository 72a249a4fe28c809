"""Metrics over TCP: hands `GET /NAME/metrics` to the service NAME of this container, which has a Unix socket only.

    python -m compose.docker.relay PORT NAME=SOCKET…

Only for Prometheus: nothing but metrics is handed through, for on those sockets one may do more than look.
"""

import http.client
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from compose.docker import health


class Relay(ThreadingHTTPServer):
    """Serves the metrics of these services, by name: the path of each one's socket."""

    daemon_threads = True

    def __init__(self, port: int, sockets: Mapping[str, str]) -> None:
        super().__init__(("0.0.0.0", port), _Handler)  # noqa: S104 (whoever is on the container's networks)
        self.sockets = sockets


class _Handler(BaseHTTPRequestHandler):
    server: Relay
    timeout = 10.0

    def do_GET(self) -> None:
        name, _, rest = self.path.removeprefix("/").partition("/")
        socket = self.server.sockets.get(name)
        if socket is None or rest != "metrics":
            known = ", ".join(f"/{name}/metrics" for name in self.server.sockets)
            self._answer(404, f"there is only {known}\n".encode())
            return
        try:
            status, body = health.get(f"unix:{socket}", "/metrics")
        except (OSError, http.client.HTTPException) as error:
            status, body = 502, f"{name} does not answer: {error}\n".encode()
        self._answer(status, body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: Prometheus asks every few seconds."""


def main(arguments: list[str]) -> int:
    """The program: it serves until it is ended."""
    pairs = [argument.partition("=") for argument in arguments[1:]]
    if not pairs or not arguments[0].isdigit() or not all(name and path for name, _, path in pairs):
        sys.stderr.write("usage: python -m compose.docker.relay PORT NAME=SOCKET…\n")
        return 2
    Relay(int(arguments[0]), {name: path for name, _, path in pairs}).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
