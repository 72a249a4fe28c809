"""A cell that leases over the original's HTTP API, beside one on the bus: they meet, and what goes wrong is said."""

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from bus.certificates import Authority
from bus.decode import Malformed
from bus.messages import CellName, Lease
from bus.tables.follower import State
from services.silk.client import LeaseDenied, LeaseLost
from services.silk.original_controller import OriginalController, OriginalLeases, OriginalLessor
from services.silk.settings import WorkerSettings
from services.silk.tenure import Tenure, boot_clock
from tests.silk.conftest import eventually, reaches
from tests.silk.processes import CENTRE, Start, Worker

LEASE = {
    "underlay_ip": "10.0.0.5",
    "overlay_subnet": "10.255.17.0/24",
    "overlay_hardware_addr": "ee:ee:0a:ff:11:00",
}


def certificates(folder: Path, address: str) -> dict[str, Path]:
    authority = Authority(folder / "authority", "silk")
    authority.ensure()
    for what, usage in (("server", "serverAuth"), ("daemon", "clientAuth")):
        names = [f"IP:{address}"]
        authority.issue(folder / f"{what}.crt", folder / f"{what}.key", names=names, usage=usage)
    return {
        "ca": authority.certificate,
        **{f"{w}_{k}": folder / f"{w}.{k}" for w in ("server", "daemon") for k in ("crt", "key")},
    }


@pytest.mark.kernel
async def test_cells_of_both_kinds_meet(start: Start, tmp_path: Path) -> None:
    files = certificates(tmp_path, CENTRE)
    centre, (first, second) = start(
        2,
        workers_up=False,
        listen=f"{CENTRE}:4103",
        ca_cert_file=str(files["ca"]),
        server_cert_file=str(files["server_crt"]),
        server_key_file=str(files["server_key"]),
        lease_expiry="4",
    )
    first.process.start()
    await first.ready()
    second.process.settings |= {
        "SILKBUS_NATS": "nats://127.0.0.1:9",
        "SILKBUS_CONTROLLER_URL": f"https://{CENTRE}:4103",
        "SILKBUS_CONTROLLER_CA": str(files["ca"]),
        "SILKBUS_CONTROLLER_CERT": str(files["daemon_crt"]),
        "SILKBUS_CONTROLLER_KEY": str(files["daemon_key"]),
        "SILKBUS_PARTITION_TOLERANCE": "4",
    }
    second.process.start()
    await second.ready()
    source, target = first.cell.container(), second.cell.container()
    await first.attach("client", source)
    address = (await second.attach("server", target))["address"]
    await asyncio.to_thread(eventually, lambda: reaches(source.rpartition("/")[2], address))
    names = {lease["cell"] for lease in (await first.call("GET", "/leases"))["leases"]}
    assert names == {"cell-1", "ip-10-77-0-2"}
    # What its enforcer asks for: its own lease is by its own name, whatever the controller calls it.
    names = {lease["cell"] for lease in (await second.call("GET", "/leases"))["leases"]}
    assert names == {"ip-10-77-0-1", "cell-2"}
    assert "ok" in (await second.readyz())[1]
    await _fenced_and_back(centre.controller, second)


async def _fenced_and_back(controller: Any, worker: Worker) -> None:
    controller.stop()
    await worker.until(lambda answer: "fenced: the lease could not be renewed in time" in answer)
    controller.start()
    await worker.ready()


class Server:
    """An HTTP server with mutual TLS that answers what it is told to, and notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.files = certificates(folder, "127.0.0.1")
        self.asked: list[tuple[str, str, Any]] = []
        self.status, self.answer, self.arrived_at = 200, "{}", 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.arrived_at = boot_clock()
                outer.asked.append((self.command, self.path, json.loads(body) if body else None))
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(outer.answer.encode())

            do_GET = do_PUT = reply  # noqa: N815 (the library's names)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.files["server_crt"], self.files["server_key"])
        context.load_verify_locations(self.files["ca"])
        context.verify_mode = ssl.CERT_REQUIRED
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{self.server.server_address[1]}"
        self.controller = OriginalController(url, self.files["ca"], self.files["daemon_crt"], self.files["daemon_key"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


SETTINGS = WorkerSettings(cell="web", underlay=IPv4Address("10.0.0.5"), partition_tolerance=1000)
OWN = Lease(IPv4Network("10.255.17.0/24"), CellName("web"), IPv4Address("10.0.0.5"), "ee:ee:0a:ff:11:00")


async def test_it_asks_as_the_originals_daemon_does(server: Server) -> None:
    lessor = OriginalLessor(server.controller, SETTINGS)
    server.answer = json.dumps(LEASE)
    tenure = await lessor.acquire()
    assert (tenure.lease, tenure.expires_in) == (OWN, 1000)
    assert tenure.confirmed_at <= server.arrived_at, "it counts from before it asked"
    server.answer = "{}"
    renewed = await lessor.renew(tenure)
    assert tenure.confirmed_at < renewed.confirmed_at <= server.arrived_at
    await lessor.release(tenure)
    assert server.asked == [
        ("PUT", "/leases/acquire", {"underlay_ip": "10.0.0.5", "single_overlay_ip": False}),
        ("PUT", "/leases/renew", LEASE),
        ("PUT", "/leases/release", {"underlay_ip": "10.0.0.5"}),
    ]


async def test_a_mismatch_is_a_loss_and_nothing_else_is(server: Server) -> None:
    lessor, tenure = OriginalLessor(server.controller, SETTINGS), Tenure(OWN, 0, 1000)
    server.status, server.answer = 409, '{"error": "renew-subnet-lease: lease mismatch"}'
    with pytest.raises(LeaseLost, match="lease mismatch"):
        await lessor.renew(tenure)
    server.answer = '{"error": "renew-subnet-lease: overlay subnet not in pool"}'
    with pytest.raises(LeaseDenied, match="not in pool"):  # it is used until it ends
        await lessor.renew(tenure)
    # Its errors are no JSON where the database's text has quotation marks (contract/cell.md 4.3).
    server.status, server.answer = 500, '{"error": "no such "table""}'
    with pytest.raises(LeaseDenied, match=r'answered renew with 500: .*"table"'):
        await lessor.renew(tenure)
    server.status, server.answer = 409, '{"error": "no lease available"}'
    with pytest.raises(LeaseDenied, match="no lease available"):
        await lessor.acquire()
    server.status, server.answer = 200, json.dumps(LEASE | {"overlay_subnet": "10.9.9.0/24"})
    with pytest.raises(LeaseDenied, match=r"leased 10\.9\.9\.0/24 .* overlay_network is 10\.255\.0\.0/16: set both"):
        await lessor.acquire()
    server.answer = json.dumps(LEASE | {"overlay_subnet": "banana"})
    with pytest.raises(Malformed, match="not an IPv4 network: 'banana'"):
        await lessor.acquire()


async def test_without_a_certificate_that_counts_there_is_no_answer(server: Server, tmp_path: Path) -> None:
    other = certificates(tmp_path / "other", "127.0.0.1")
    controller = OriginalController(server.controller.url, other["ca"], other["daemon_crt"], other["daemon_key"])
    with pytest.raises(LeaseDenied, match=r"does not answer PUT /leases/acquire: .*CERTIFICATE_VERIFY_FAILED"):
        await OriginalLessor(controller, SETTINGS).acquire()
    missing = OriginalController(server.controller.url, tmp_path / "none", other["daemon_crt"], other["daemon_key"])
    with pytest.raises(LeaseDenied, match="No such file"):
        await OriginalLessor(missing, SETTINGS).acquire()


async def test_the_list_is_kept_while_nobody_answers_and_a_bad_lease_is_left_out(server: Server) -> None:
    leases = OriginalLeases(server.controller)
    heard: list[int] = []
    leases.listen(lambda _: heard.append(len(leases.entries)))
    bad = {"underlay_ip": "x", "overlay_subnet": "10.255.18.0/24", "overlay_hardware_addr": "zz"}
    server.answer = json.dumps({"leases": [LEASE, bad]})
    running = asyncio.create_task(leases.run())
    await asyncio.wait_for(leases.usable(), 30)
    assert [str(lease.cell) for lease in leases.entries.values()] == ["ip-10-0-0-5"]
    assert (leases.state, heard) == (State.LIVE, [1])
    running.cancel()
    server.status = 500
    running = asyncio.create_task(leases.run())
    while leases.state is not State.CACHED:
        await asyncio.sleep(0.05)
    assert len(leases.entries) == 1
    running.cancel()
