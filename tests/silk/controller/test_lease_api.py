"""The original's HTTP API of leases, to the byte (contract/cell.md 4.2, 4.3), by a controller whose bus is away."""

import json
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

import httpx
import pytest

from bus.database import open_database
from bus.ledger import Ledger
from services.silk.leases import LeaseStore, Terms
from services.silk.pool import Pool
from tests.silk.controller.conftest import SMALL
from tests.silk.controller.process import ControllerProcess


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    folder = tmp_path_factory.mktemp("api")
    controller = ControllerProcess(folder, f"sqlite:///{folder}/silk.db", overlay_network=SMALL, subnet_rest=0)
    controller.start()
    yield controller
    controller.close()


@pytest.fixture
def daemon(standing: ControllerProcess) -> Iterator[httpx.Client]:
    """A daemon's client; there are no leases."""
    with standing.client() as client:
        for lease in client.get("/leases").json()["leases"]:
            client.put("/leases/release", json={"underlay_ip": lease["underlay_ip"]}).raise_for_status()
        yield client


def acquire(daemon: httpx.Client, underlay: str, *, single: bool = False) -> httpx.Response:
    return daemon.put("/leases/acquire", json={"underlay_ip": underlay, "single_overlay_ip": single})


def test_a_life(daemon: httpx.Client) -> None:
    assert daemon.get("/leases").content == b'{"leases":[]}'
    answer = acquire(daemon, "10.0.0.5")
    lease = b'{"underlay_ip":"10.0.0.5","overlay_subnet":"10.255.1.0/24","overlay_hardware_addr":"ee:ee:0a:ff:01:00"}'
    assert (answer.status_code, answer.content) == (200, lease)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert acquire(daemon, "10.0.0.5").content == lease
    renewed = daemon.put("/leases/renew", content=lease)
    assert (renewed.status_code, renewed.content) == (200, b"{}")
    assert daemon.get("/leases").content == b'{"leases":[' + lease + b"]}"
    for _ in range(2):
        released = daemon.put("/leases/release", json={"underlay_ip": "10.0.0.5"})
        assert (released.status_code, released.content) == (200, b"{}")
    assert daemon.put("/leases/release", json={}).content == b"{}"
    assert daemon.get("/leases").content == b'{"leases":[]}'


def test_renewing_what_is_not_known_takes_it_up(daemon: httpx.Client) -> None:
    """As after a move from the original to a database that does not know its leases."""
    lease = {"underlay_ip": "10.0.0.5", "overlay_subnet": "10.255.2.0/24", "overlay_hardware_addr": "ee:ee:0a:ff:02:00"}
    assert daemon.put("/leases/renew", json=lease).content == b"{}"
    assert daemon.get("/leases").json() == {"leases": [lease]}
    assert daemon.put("/leases/renew", json={**lease, "underlay_ip": "10.0.0.6"}).status_code == 409
    assert daemon.put("/leases/renew", json={**lease, "overlay_subnet": "10.255.3.0/24"}).status_code == 409
    assert daemon.get("/leases").json() == {"leases": [lease]}


def test_no_more_and_single_addresses(daemon: httpx.Client) -> None:
    for number in (1, 2, 3):
        assert acquire(daemon, f"10.0.0.{number}").status_code == 200
    answer = acquire(daemon, "10.0.0.4")
    assert (answer.status_code, answer.content) == (409, b'{"error": "no lease available"}')
    single = acquire(daemon, "10.0.0.4", single=True).json()
    assert (single["overlay_subnet"], single["overlay_hardware_addr"]) == ("10.255.0.1/32", "ee:ee:0a:ff:00:01")
    assert daemon.put("/leases/renew", json=single).content == b"{}"
    as_block = {**single, "overlay_subnet": "10.255.0.1/24"}  # what a daemon asks after its restart
    answer = daemon.put("/leases/renew", json=as_block)
    assert (answer.status_code, answer.content) == (409, b'{"error": "renew-subnet-lease: lease mismatch"}')
    assert acquire(daemon, "10.0.0.4", single=True).json() == single


LEASE = {"underlay_ip": "10.0.0.5", "overlay_subnet": "10.255.1.0/24", "overlay_hardware_addr": "ee:ee:0a:ff:01:00"}


@pytest.mark.parametrize(
    ("call", "body", "status", "error"),
    [
        ("acquire", {"underlay_ip": "banana"}, 500, "invalid ipv4 address: banana"),
        ("acquire", {"underlay_ip": "fd00::1"}, 500, "invalid ipv4 address: fd00::1"),
        ("acquire", {"underlay_ip": 'a"b'}, 500, 'invalid ipv4 address: a"b'),
        ("acquire", {}, 500, "invalid ipv4 address: "),
        ("acquire", b"", 400, "unmarshal-request: unexpected end of JSON input"),
        ("acquire", {"underlay_ip": 5}, 400, "unmarshal-request: request.underlay_ip must be a string, not a number"),
        ("renew", b"[1]", 400, "unmarshal-request: the body must be an object, not a list"),
        ("release", b"{", 400, None),
        ("renew", {**LEASE, "underlay_ip": "x"}, 409, "renew-subnet-lease: invalid underlay ip: x"),
        ("renew", {**LEASE, "overlay_subnet": "x"}, 409, "renew-subnet-lease: invalid CIDR address: x"),
        (
            "renew",
            {**LEASE, "overlay_subnet": "10.255.1.0"},
            409,
            "renew-subnet-lease: invalid CIDR address: 10.255.1.0",
        ),
        (
            "renew",
            {**LEASE, "overlay_hardware_addr": "zz"},
            409,
            "renew-subnet-lease: address zz: invalid MAC address",
        ),
        ("renew", {**LEASE, "overlay_hardware_addr": "ee:ee:0a:ff:02:00"}, 409, "renew-subnet-lease: lease mismatch"),
        ("renew", {**LEASE, "overlay_subnet": "10.9.1.0/24"}, 409, "renew-subnet-lease: overlay subnet not in pool"),
        ("renew", {**LEASE, "overlay_subnet": "10.255.0.0/16"}, 409, "renew-subnet-lease: overlay subnet not in pool"),
    ],
)
def test_errors(daemon: httpx.Client, call: str, body: object, status: int, error: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = daemon.put(f"/leases/{call}", content=content)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    told = answer.json()["error"]
    assert answer.content == b'{"error": ' + json.dumps(told).encode() + b"}"
    assert told.startswith("unmarshal-request: ") if error is None else told == error
    assert daemon.get("/leases").content == b'{"leases":[]}'


def test_keys_in_any_case(daemon: httpx.Client) -> None:
    assert daemon.put("/leases/acquire", json={"Underlay_IP": "10.0.0.9", "other": 1}).status_code == 200


def test_what_is_not_there(daemon: httpx.Client) -> None:
    for method, path, status, body, allow in (
        ("GET", "/leases/acquire", 405, b"Method Not Allowed\n", "PUT"),
        ("POST", "/leases", 405, b"Method Not Allowed\n", "GET"),
        ("GET", "/", 404, b"404 page not found\n", None),
        ("GET", "/leases/x", 404, b"404 page not found\n", None),
    ):
        answer = daemon.request(method, path)
        assert (answer.status_code, answer.content, answer.headers.get("allow")) == (status, body, allow)
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_only_with_a_certificate(standing: ControllerProcess) -> None:
    with standing.client(certificate=False) as client, pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        client.get("/leases")
    with socket.create_connection(("127.0.0.1", standing.port), 10) as plain:
        plain.sendall(b"GET /leases HTTP/1.1\r\n\r\n")
        assert plain.recv(1000).startswith(b"HTTP/1.0 400 Bad Request")


def test_health(standing: ControllerProcess) -> None:
    answer = httpx.get(f"{standing.health}/health", timeout=30, trust_env=False)
    assert (answer.status_code, answer.content) == (200, b"")
    standing.wait_until(lambda: standing.ready()[1] == "bus: no connection to NATS\ndatabase: ok\nexpiry: ok\n")
    metrics = httpx.get(f"{standing.health}/metrics", timeout=30, trust_env=False).text
    assert 'silkbus_silk_subnets{kind="block",state="all"} 3.0' in metrics
    assert 'silkbus_silk_subnets{kind="single",state="free"}' in metrics


async def test_a_cell_with_a_name_keeps_its_lease_when_a_daemon_renews_it(
    standing: ControllerProcess, daemon: httpx.Client
) -> None:
    """Both sorts of cells are led at the same time; the daemon of a cell that has gone over may still run."""
    async with open_database(str(standing.settings["database"])) as database:
        store = LeaseStore(Ledger(database, "leases"), Terms(Pool((SMALL,), 24), 1000, rest=0))
        lease = (await store.acquire("diego-1", IPv4Address("10.0.0.5"))).result  # type: ignore[arg-type]
        assert lease is not None
        told = {"underlay_ip": "10.0.0.5", "overlay_subnet": str(lease.subnet), "overlay_hardware_addr": lease.mac}
        assert daemon.get("/leases").json() == {"leases": [told]}
        assert daemon.put("/leases/renew", json=told).content == b"{}"
        assert acquire(daemon, "10.0.0.5").json() == told
        await store.renew(lease)
