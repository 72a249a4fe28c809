"""The parts of compose/docker that need no Docker: secrets, health check, the relay of metrics."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import UnixStreamServer

import pytest

from compose.docker import health, relay, secrets


class Service(UnixStreamServer):
    """A service's socket: answers with the path it was asked for, not ready as long as `ready` is false."""

    ready = True


class Answers(BaseHTTPRequestHandler):
    server: Service  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.send_response(503 if self.path == "/readyz" and not self.server.ready else 200)
        self.end_headers()
        self.wfile.write(f"asked for {self.path}".encode())

    def address_string(self) -> str:
        return "a Unix socket"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    server = Service(str(tmp_path / "s.sock"), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_health(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"unix:{service.server_address!s}"
    assert health.main([place]) == 0
    service.ready = False
    missing = f"{place}-none"
    assert health.main([place, missing]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{place}: asked for /readyz"
    assert second.startswith(f"{missing}: ")
    assert "No such file" in second
    assert health.main([]) == 2
    assert "must be unix:SOCKET" in (health.problem("ftp:nowhere") or "")


def test_health_of_a_path_over_tcp() -> None:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        server.ready = False  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http:127.0.0.1:{server.server_port}"
        assert health.problem(f"{place}/healthz") is None
        assert health.problem(place) == "asked for /readyz"
        server.shutdown()


def test_relay_hands_out_metrics_and_nothing_else(service: Service, tmp_path: Path) -> None:
    sockets = {"silk": str(service.server_address), "away": str(tmp_path / "none.sock")}
    with relay.Relay(0, sockets) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http:127.0.0.1:{server.server_port}"

        def get(path: str) -> tuple[int, str]:
            status, body = health.get(place, path)
            return status, body.decode()

        assert get("/silk/metrics") == (200, "asked for /metrics")
        for path in ("/silk/state", "/silk/metrics/../state", "/other/metrics", "/", "/silk/metrics?x", "//metrics"):
            assert get(path) == (404, "there is only /silk/metrics, /away/metrics\n")
        status, text = get("/away/metrics")
        assert status == 502
        assert text.startswith("away does not answer: ")
        server.shutdown()


@pytest.mark.kernel
def test_secrets_are_made_once(tmp_path: Path) -> None:
    def content() -> dict[str, tuple[str, int, int]]:
        return {
            str(file.relative_to(tmp_path)): (file.read_text(), file.stat().st_uid, file.stat().st_mode & 0o777)
            for file in tmp_path.rglob("*")
            if file.is_file()
        }

    secrets.make(tmp_path, ("cell-1",))
    first = content()
    secrets.make(tmp_path, ("cell-1",))
    assert content() == first
    secrets.make(tmp_path, ("cell-1", "cell-2"))
    added = content()
    changed = {name for name, value in first.items() if added[name] != value}
    assert changed == {"servers/nats/accounts.conf"}
    assert {name for name in added if name not in first} == {
        f"clients/cell/cell-2/{name}" for name in ("ca.crt", "client.crt", "client.key")
    }
    for name, (_, owner, mode) in added.items():
        if name.endswith((".key", ".password", "token", "tokens.json", "settings.json")):
            assert mode == 0o600, name
        root = name.startswith(("authority/", "clients/cell/", "clients/operator/"))
        assert owner == (0 if root else secrets.SERVICE_UID), name
    password = first["postgres/policy.password"][0].strip()
    settings = json.loads(first["clients/policy-server/settings.json"][0])
    assert settings == {"database": f"postgresql://policy:{password}@postgres/policy"}
    assert password not in first["clients/silk-controller/settings.json"][0]
