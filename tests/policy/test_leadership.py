"""One of several servers leads, by a row in a real database."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from databases import Database

from bus.database import open_database, transaction
from bus.database_options import DatabaseOptions
from bus.ledger import Ledger
from services.policy import leadership
from services.policy.leadership import Deposed, Fence, Leadership
from services.policy.migrate import open_ledger
from tests.bus.tables import cancel
from tests.databases import EmptyDatabase

OPTIONS = DatabaseOptions()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the times; a lead lasts long enough for a slow machine."""
    for name, seconds in (("HOLD_SECONDS", 3.0), ("RENEW_SECONDS", 0.5), ("LOOK_SECONDS", 0.1)):
        monkeypatch.setattr(leadership, name, seconds)


class Server:
    """One of several servers; `fence` is that of the term in which it leads now, or led last."""

    def __init__(self, database: Database) -> None:
        self.leadership = Leadership(database, "upkeep")
        self.fence: Fence | None = None
        self.leads = asyncio.Event()
        self._task = asyncio.create_task(self.leadership.run(self._duties))

    async def _duties(self, fence: Fence) -> None:
        self.fence = fence
        self.leads.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.leads.clear()

    async def stop(self) -> None:
        await cancel(self._task)


@asynccontextmanager
async def servers(url: str, count: int) -> AsyncIterator[list[tuple[Server, Ledger]]]:
    """Each with connections of its own."""
    async with open_ledger(url, OPTIONS) as first, open_database(url, OPTIONS) as second:
        ledgers = [first, Ledger(second, first.table)][:count]
        running = [(Server(ledger.database), ledger) for ledger in ledgers]
        try:
            yield running
        finally:
            for server, _ in running:
                await server.stop()


async def within(seconds: float, condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(seconds):
        await condition()


async def test_one_leads_and_another_follows_when_it_ends(database: EmptyDatabase) -> None:
    async with servers(database.url, 2) as ((one, _), (two, _)):
        done, _ = await asyncio.wait(
            [asyncio.create_task(server.leads.wait()) for server in (one, two)],
            return_when=asyncio.FIRST_COMPLETED,
            timeout=30,
        )
        assert done
        leader, other = (one, two) if one.leads.is_set() else (two, one)
        await asyncio.sleep(4)  # longer than a lead lasts unless it is extended
        assert leader.leads.is_set()
        assert not other.leads.is_set()
        assert leader.leadership.term is not None
        number = leader.leadership.term.number
        await leader.stop()
        await within(30, other.leads.wait)
        assert other.leadership.term is not None
        assert other.leadership.term.number == number + 1


async def test_a_leader_that_was_paused_cannot_write(database: EmptyDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    async with servers(database.url, 1) as ((one, ledger),), open_database(database.url, OPTIONS) as other:
        await within(30, one.leads.wait)
        fence = one.fence
        assert fence is not None
        async with transaction(ledger.database, write=True) as connection:
            await fence(connection)

        async def nothing() -> None:
            return None

        monkeypatch.setattr(one.leadership, "_extend", nothing)  # it hangs: nothing is extended
        successor = Server(other)
        try:
            await within(30, successor.leads.wait)
            with pytest.raises(Deposed, match="term 1 is over, another server leads in term 2"):
                async with transaction(ledger.database, write=True) as connection:
                    await fence(connection)
            async with transaction(other, write=True) as connection:
                assert successor.fence is not None
                await successor.fence(connection)
        finally:
            await successor.stop()


async def test_nobody_succeeds_amid_a_fenced_write(database: EmptyDatabase) -> None:
    """The write that has passed the fence ends before the next term begins."""
    async with servers(database.url, 1) as ((one, ledger),), open_database(database.url, OPTIONS) as other:
        await within(30, one.leads.wait)
        fence = one.fence
        assert fence is not None
        order = []
        candidate = Leadership(other, "upkeep")

        async def write() -> None:
            async with transaction(ledger.database, write=True) as connection:
                await fence(connection)
                await asyncio.sleep(5)
                order.append("written")

        async def succeed() -> None:
            while await candidate._hold() is None:
                await asyncio.sleep(0.1)
            order.append("succeeded")

        writing = asyncio.create_task(write())
        await asyncio.sleep(0.5)
        await one.stop()  # its time is given up, or over, while it writes
        await asyncio.gather(writing, succeed())
        assert order == ["written", "succeeded"]


async def test_a_database_that_is_away_ends_the_lead(
    database: EmptyDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with servers(database.url, 1) as ((one, _),):
        await within(30, one.leads.wait)
        extend = one.leadership._extend

        async def away() -> None:
            raise ConnectionResetError("away")

        monkeypatch.setattr(one.leadership, "_extend", away)
        await asyncio.sleep(1)
        assert one.leads.is_set(), "not at once"
        async with asyncio.timeout(30):
            while one.leads.is_set():
                await asyncio.sleep(0.1)
        assert "leading no more" in caplog.text
        monkeypatch.setattr(one.leadership, "_extend", extend)
        await within(30, one.leads.wait)


async def test_duties_that_fail_are_begun_again(
    database: EmptyDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leadership, "RESTART_SECONDS", 0.1)
    began = 0
    both = asyncio.Event()

    async def failing(_: Fence) -> None:
        nonlocal began
        began += 1
        if began == 2:
            both.set()
        raise RuntimeError("duties")

    async with open_ledger(database.url, OPTIONS) as ledger:
        task = asyncio.create_task(Leadership(ledger.database, "upkeep").run(failing))
        try:
            await within(30, both.wait)
        finally:
            await cancel(task)
    assert "failed, beginning again" in caplog.text
