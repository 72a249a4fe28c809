"""Controllers as processes: several on one database, killed, cut off; cells speak to them on a real bus."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import httpx
import pytest

from bus.connection import BusAway, Connection, NoAnswer, connect
from bus.messages import CellName, Lease
from bus.tables import LEASES, Replica
from services.silk.client import LeaseClient, LeaseDenied, LeaseLost
from services.silk.tenure import Tenure
from tests.bus.tables import cancel, eventually
from tests.databases import EmptyDatabase
from tests.nats_server import NatsServer
from tests.silk.controller.process import ControllerProcess

OVERLAY = (IPv4Network("10.255.0.0/16"),)
WAIT = 60.0
ON_SERVERS = pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)
ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def processes() -> Iterator[list[ControllerProcess]]:
    made: list[ControllerProcess] = []
    yield made
    for each in made:
        each.close()


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Connection]:
    async with connect(nats_server.url, role="cell", name="test") as connection:
        assert await connection.wait_connected(WAIT)
        yield connection


def client(bus: Connection, number: int, *, single: bool = False) -> LeaseClient:
    return LeaseClient(bus, CellName(f"cell-{number}"), IPv4Address("10.0.0.0") + number, OVERLAY, single)


async def insist(ask: Any, *arguments: Any) -> Any:
    """As a cell does: ask until somebody answers; what the answer denies is asked for again, too."""
    deadline = asyncio.get_running_loop().time() + WAIT
    while True:
        try:
            return await ask(*arguments)
        except (NoAnswer, BusAway, LeaseDenied):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.1)


@ON_SERVERS
async def test_no_two_controllers_give_the_same(
    database: EmptyDatabase,
    nats_server: NatsServer,
    bus: Connection,
    processes: list[ControllerProcess],
    tmp_path: Path,
) -> None:
    """Two processes, one of them killed amid a change and again after one; daemons and cells ask at the same time."""
    processes += [
        ControllerProcess(tmp_path, database.url, nats_server.url, name, overlay_network="10.255.0.0/18")
        for name in ("a", "b")
    ]
    processes[0].start(failpoints="silk.lease.before-commit=kill:3")
    processes[1].start()
    tenures: list[Tenure] = []

    async def cells() -> None:
        tenures.extend(await asyncio.gather(*(insist(client(bus, number).acquire) for number in range(1, 21))))

    async def daemons() -> list[dict[str, str]]:
        answers = []
        async with httpx.AsyncClient(verify=processes[1].tls(), base_url=processes[1].url, timeout=WAIT) as daemon:
            for number in range(101, 116):
                answer = await daemon.put("/leases/acquire", json={"underlay_ip": f"10.0.0.{number}"})
                answers.append(answer.json())
        return answers

    _, answers = await asyncio.gather(cells(), daemons())
    assert processes[0].process is not None
    assert await asyncio.to_thread(processes[0].process.wait, 60) == -signal.SIGKILL
    processes[0].start(failpoints="silk.lease.after-commit=kill:2")
    while processes[0].process.poll() is None:  # which of them answers is not ours to say
        assert len(tenures) < 45, "of so many requests it answered none"
        number = len(tenures) + 1
        tenures += await asyncio.gather(*(insist(client(bus, number + each).acquire) for each in range(5)))
    assert processes[0].process.wait() == -signal.SIGKILL
    processes[0].start()
    again = await asyncio.gather(*(insist(client(bus, number + 1).acquire) for number in range(len(tenures))))
    assert [tenure.lease for tenure in again] == [tenure.lease for tenure in tenures], "all have what they were told"
    told = {str(tenure.lease.subnet) for tenure in tenures} | {answer["overlay_subnet"] for answer in answers}
    assert len(told) == len(tenures) + 15
    await asyncio.gather(*(insist(client(bus, int(str(t.lease.cell)[5:])).renew, t) for t in tenures))
    async with replica(bus) as leases:
        await eventually(lambda: {str(lease.subnet) for lease in leases.entries.values()} == told, WAIT)


@contextlib.asynccontextmanager
async def replica(bus: Connection) -> AsyncIterator[Replica[Lease]]:
    made = Replica(bus, LEASES)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        await cancel(task)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_the_database_goes_and_comes_back(
    database: EmptyDatabase,
    nats_server: NatsServer,
    bus: Connection,
    processes: list[ControllerProcess],
    tmp_path: Path,
) -> None:
    assert database.server is not None
    controller = ControllerProcess(tmp_path, database.url, nats_server.url)
    processes.append(controller)
    controller.start()
    tenure = await insist(client(bus, 1).acquire)
    await eventually(lambda: controller.ready()[0] == 200, WAIT)
    database.server.kill()
    try:
        for ask in (client(bus, 1).renew(tenure), client(bus, 2).acquire()):
            with pytest.raises((LeaseDenied, NoAnswer)):
                await ask
        await eventually(lambda: "database: the database has not answered for" in controller.ready()[1], WAIT)
        answer = httpx.get(f"{controller.health}/health", timeout=WAIT, trust_env=False)
        assert (answer.status_code, answer.content) == (500, b'{"error": "check database failed"}')
    finally:
        database.server.start()
    await insist(client(bus, 1).renew, tenure)
    assert (await insist(client(bus, 1).acquire)).lease == tenure.lease
    await insist(client(bus, 2).acquire)
    await eventually(lambda: controller.ready()[0] == 200, WAIT)


@ON_SQLITE
async def test_a_lease_ends_only_after_the_controller_was_up_for_a_while(
    database: EmptyDatabase,
    nats_server: NatsServer,
    bus: Connection,
    processes: list[ControllerProcess],
    tmp_path: Path,
) -> None:
    controller = ControllerProcess(tmp_path, database.url, nats_server.url, lease_expiry=4, lease_grace=4)
    processes.append(controller)
    controller.start()
    tenure = await insist(client(bus, 1).acquire)
    controller.end(signal.SIGKILL)
    await asyncio.sleep(6)
    controller.start()
    await insist(client(bus, 1).renew, tenure)  # late, and still its own
    assert "lease expired" not in controller.log
    await eventually(lambda: "lease expired" in controller.log, WAIT)
    await insist(client(bus, 1).renew, tenure)  # later still, and nobody else has it
    await insist(client(bus, 1).release, tenure)
    with pytest.raises(LeaseLost):
        await insist(client(bus, 1).renew, tenure)


@ON_SQLITE
async def test_single_addresses_over_the_bus(
    database: EmptyDatabase,
    nats_server: NatsServer,
    bus: Connection,
    processes: list[ControllerProcess],
    tmp_path: Path,
) -> None:
    controller = ControllerProcess(tmp_path, database.url, nats_server.url)
    processes.append(controller)
    controller.start()
    assert str((await insist(client(bus, 1, single=True).acquire)).lease.subnet) == "10.255.0.1/32"
    assert str((await insist(client(bus, 2).acquire)).lease.subnet) == "10.255.1.0/24"
