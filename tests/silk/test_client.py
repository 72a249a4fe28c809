"""Asking for a lease on a real bus: what is asked, what answers mean, and from when the time counts."""

from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from bus import subjects
from bus.connection import Connection, connect
from bus.decode import Fields, Malformed
from bus.messages import CellName
from services.silk.client import LeaseClient, LeaseDenied, LeaseLost
from services.silk.tenure import boot_clock
from tests.nats_server import NatsServer
from tests.silk.conftest import lease_of

LEASE = lease_of(1)
OVERLAY = (IPv4Network("10.255.0.0/16"),)


class Controller:
    """Answers each lease request with `answer`, and notes it, and when it came."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {"lease": LEASE.encode(), "expires_in": 100}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.arrived_at = 0.0

    async def handle(self, subject: str, fields: Fields) -> dict[str, Any]:
        self.arrived_at = boot_clock()
        self.asked.append((subject, {name: value for name, value in fields._values.items() if name != "version"}))
        return self.answer


@pytest.fixture
async def controller(nats_server: NatsServer) -> AsyncIterator[Controller]:
    made = Controller()
    async with connect(nats_server.url, role="server", name="controller") as connection:
        for verb in ("acquire", "renew", "release"):
            await connection.serve(subjects.lease("*", verb), made.handle, queue="silk-controller")
        await connection.wait_connected(30)
        yield made


@pytest.fixture
async def connection(nats_server: NatsServer) -> AsyncIterator[Connection]:
    async with connect(nats_server.url, role="cell", name="cell-1") as made:
        await made.wait_connected(30)
        yield made


def client(connection: Connection, **more: Any) -> LeaseClient:
    return LeaseClient(connection, CellName("cell-1"), IPv4Address("10.77.0.1"), OVERLAY, **more)


async def test_the_time_counts_from_before_the_question(controller: Controller, connection: Connection) -> None:
    cell = client(connection)
    tenure = await cell.acquire()
    assert tenure.lease == LEASE
    assert tenure.confirmed_at <= controller.arrived_at
    renewed = await cell.renew(tenure)
    assert tenure.confirmed_at < renewed.confirmed_at <= controller.arrived_at
    await cell.release(renewed)
    verbs = [subject.rpartition(".")[2] for subject, _ in controller.asked]
    assert verbs == ["acquire", "renew", "release"]


async def test_what_was_had_is_asked_for_again(controller: Controller, connection: Connection) -> None:
    cell = client(connection, single=True)
    await cell.acquire()
    await cell.acquire()
    (_, first), (_, second) = controller.asked
    assert first == {"underlay": "10.77.0.1", "single": True}
    assert second == {"underlay": "10.77.0.1", "single": True, "subnet": "10.255.1.0/24"}


async def test_only_a_loss_is_a_loss(controller: Controller, connection: Connection) -> None:
    cell = client(connection)
    tenure = await cell.acquire()
    controller.answer = {"error": "the database is away"}
    with pytest.raises(LeaseDenied, match="the database is away"):
        await cell.renew(tenure)
    controller.answer = {"error": "another's", "lost": True}
    with pytest.raises(LeaseLost, match="another's"):
        await cell.renew(tenure)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"lease": LEASE.encode()}, "expires_in: missing"),
        ({"lease": LEASE.encode(), "expires_in": float("nan")}, "expires_in: must be a finite number"),
        ({"lease": lease_of(2).encode(), "expires_in": 100}, "is of cell-2 at 10.77.0.2, not of this cell"),
        ({"lease": {**LEASE.encode(), "subnet": "10.255.1.0"}, "expires_in": 100}, None),
        ({"lease": {**LEASE.encode(), "mac": "x"}, "expires_in": 100}, "not a MAC address"),
        ({}, "lease: missing"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    controller: Controller, connection: Connection, answer: dict[str, Any], error: str | None
) -> None:
    controller.answer = answer
    if error is None:  # a lease of one address, which is one of a machine without containers
        assert (await client(connection).acquire()).lease.subnet.prefixlen == 32
        return
    with pytest.raises((Malformed, LeaseDenied), match=error):
        await client(connection).acquire()


async def test_a_subnet_that_is_not_of_the_overlay_is_named(controller: Controller, connection: Connection) -> None:
    controller.answer = {"lease": {**LEASE.encode(), "subnet": "10.9.1.0/24"}, "expires_in": 100}
    with pytest.raises(LeaseDenied, match=r"10\.9\.1\.0/24, which is not in the overlay network 10\.255\.0\.0/16"):
        await client(connection).acquire()
