"""What a cell says of itself: a real replica, reconciler, kernel and bus."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from bus import subjects
from bus.connection import connect
from bus.database import open_database
from bus.ledger import Ledger
from bus.messages import AppId, CellState, Policy, Ports, Protocol
from bus.tables import POLICIES, Publisher, Replica
from bus.wire import decode
from services.enforcer.report import INTERVAL, KEEP_ALIVE, Reporter
from services.policy.schema import MIGRATIONS
from services.policy.store import Store, entries
from services.policy.tag_pool import TagPool
from tests.bus.tables import eventually
from tests.enforcer.conftest import enforcing
from tests.enforcer.world import Cell
from tests.nats_server import NatsServer

pytestmark = pytest.mark.kernel


def one(number: int) -> list[Policy]:
    return [Policy(AppId("a"), AppId(f"b{number}"), Ports(Protocol.TCP, 1, 2))]


@asynccontextmanager
async def policy_server(bus: NatsServer, folder: Path) -> AsyncIterator[tuple[Store, Ledger]]:
    async with (
        open_database(f"sqlite:///{folder / 'p.db'}") as database,
        connect(bus.url, role="policy-server", name="p") as connection,
    ):
        ledger = Ledger(database, POLICIES.name)
        await ledger.migrate(MIGRATIONS)
        publisher = Publisher(connection, ledger, POLICIES, entries)
        task = asyncio.create_task(publisher.run())
        yield Store(ledger, TagPool(rest=0, clock=time.time), publisher.committed), ledger
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_it_says_what_the_kernel_has_at_once_and_not_too_often_and_when_nothing_happens(
    nats_server: NatsServer, cell: Cell, tmp_path: Path
) -> None:
    heard: list[tuple[float, CellState]] = []

    def hear(subject: str, data: bytes) -> None:
        heard.append((time.monotonic(), CellState.decode(decode(data, subject))))

    async with (
        policy_server(nats_server, tmp_path) as (store, ledger),
        connect(nats_server.url, role="cell", name="one") as connection,
        enforcing(cell, "nft") as enforcer,
        connect(nats_server.url, role="policy-server", name="other") as listener,
    ):
        await listener.listen(subjects.cell("*", "state"), hear)
        assert await listener.wait_connected(10)
        replica = Replica(connection, POLICIES)
        replica.listen(enforcer.reconciler.update_policies)
        reporter = Reporter(connection, "one", replica, enforcer.reconciler)
        tasks = [asyncio.create_task(work) for work in (replica.run(), reporter.run())]
        epoch, _ = await ledger.head()
        for number in range(30):
            await store.create(one(number), actor="test")
        await eventually(lambda: bool(heard) and heard[-1][1].revision == 30, 60)
        last = heard[-1][1]
        assert (last.epoch, last.table, last.problem) == (epoch, "live", "")
        revisions = [state.revision for _, state in heard]
        assert revisions == sorted(revisions)
        assert len(heard) <= 2 + (heard[-1][0] - heard[0][0]) / INTERVAL
        begun, count = time.monotonic(), len(heard)
        await eventually(lambda: len(heard) >= count + 2, 60)
        assert time.monotonic() - begun > KEEP_ALIVE
        assert heard[-1][1] == last
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
