"""Changes in SQL, on each kind of database: revisions without a gap, exactly once, whatever happens to connections."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import sqlalchemy
from databases import Database

import bus.database
from bus.database import is_transient, open_database, transaction
from bus.ledger import Change, Ledger
from bus.messages import Revision
from bus.tables.table import Content, Key
from bus.wire import unpack
from tests.bus.proxy import Proxy, proxy_to
from tests.bus.tables import NOTES, Notes, entries
from tests.databases import EmptyDatabase

SERVERS = pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)
"""For what can only happen to a database behind a connection."""


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Notes]:
    async with open_database(url) as database:
        notes = Notes(database)
        await notes.migrate()
        yield notes


async def replayed(ledger: Ledger, until: int) -> dict[Key, Any]:
    """What the change log makes of an empty table, up to a revision; its revisions must be 1, 2, 3…"""
    found: dict[Key, Any] = {}
    revision = 0
    while revision < until:
        for entry in await ledger.log_from(Revision(revision + 1), limit=min(1000, until - revision)):
            assert entry.revision == revision + 1
            revision = entry.revision
            for key, data in entry.changes:
                found.pop(key, None)
                if data is not None:
                    found[key] = unpack(data, "log")
        assert revision, "the change log is empty"
    return found


async def assert_consistent(notes: Notes, revision: int) -> None:
    """The head is at `revision`, and the log up to there, without a gap, makes the rows."""
    assert (await notes.ledger.head())[1] == revision
    content, _ = await notes.ledger.content(entries)
    assert content.revision == revision
    assert await replayed(notes.ledger, revision) == {k: unpack(v, "content") for k, v in content.entries.items()}
    assert await notes.ledger.log_from(Revision(revision + 1)) == []


class Writer:
    """A server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.answered: dict[str, int] = {}

    @classmethod
    async def start(cls, url: str, prefix: str, count: int) -> "Writer":
        command = [sys.executable, "-m", "tests.bus.ledger_writer", url, prefix, str(count)]
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
        return cls(await asyncio.create_subprocess_exec(*command, **pipes))

    async def ready(self) -> None:
        assert await self._line() == "ready"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    async def answers(self, count: int) -> None:
        """Read until `count` changes were answered, or the process has ended."""
        while len(self.answered) < count and (line := await self._line()):
            name, revision = line.split()
            self.answered[name] = int(revision)

    async def _line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(120):
            return (await self.process.stdout.readline()).decode().strip()


async def test_two_servers_times_500_concurrent_changes_are_1_to_n(database: EmptyDatabase) -> None:
    writers = [await Writer.start(database.url, prefix, 500) for prefix in ("a", "b")]
    await asyncio.gather(*(writer.ready() for writer in writers))  # both have migrated, at the same time
    async with opened(database.url) as notes:
        for writer in writers:
            writer.go()
        await asyncio.gather(*(writer.answers(500) for writer in writers))
        assert [await writer.process.wait() for writer in writers] == [0, 0]
        answered = {name: revision for writer in writers for name, revision in writer.answered.items()}
        assert sorted(answered.values()) == list(range(1, 1001))
        for entry in await notes.ledger.log_from(Revision(1)):
            assert answered[next(key[0] for key, _ in entry.changes if key[0] != "shared")] == entry.revision
        await assert_consistent(notes, 1000)


async def test_a_killed_server_leaves_no_gap_and_loses_nothing_it_answered(database: EmptyDatabase) -> None:
    dying, living = [await Writer.start(database.url, prefix, 300) for prefix in ("d", "l")]
    await asyncio.gather(dying.ready(), living.ready())
    for writer in (dying, living):
        writer.go()
    await dying.answers(40)
    dying.process.kill()
    await asyncio.gather(dying.answers(300), living.answers(300))
    assert await living.process.wait() == 0
    async with opened(database.url) as notes:
        logged = {
            key[0]: entry.revision for entry in await notes.ledger.log_from(Revision(1)) for key, _ in entry.changes
        }
        assert {**dying.answered, **living.answered}.items() <= logged.items()
        await assert_consistent(notes, max(logged.values()))


async def test_content_is_one_moment_while_others_write(database: EmptyDatabase) -> None:
    writer = await Writer.start(database.url, "w", 400)
    await writer.ready()
    async with opened(database.url) as notes:
        writer.go()
        writing = asyncio.create_task(writer.answers(400))
        seen: set[int] = set()
        while not writing.done():
            content, request = await notes.ledger.content(entries)
            seen.add(content.revision)
            replay = Content.of(content.epoch, content.revision, {})
            for entry in await notes.ledger.log_from(Revision(1)) if content.revision else ():
                if entry.revision <= content.revision:
                    replay.apply(entry.revision, entry.changes)
                    last = entry.request_id
            assert replay.digest == content.digest
            assert replay.revision == content.revision
            assert not content.revision or request == last
            await asyncio.sleep(0)
        await writing
        assert await writer.process.wait() == 0
        assert len(seen) > 2, "content was never read between two changes"
        await assert_consistent(notes, 400)


async def test_what_raises_or_changes_nothing_leaves_no_trace(database: EmptyDatabase) -> None:
    class Refused(Exception):
        pass

    async def refuse(change: Change) -> None:
        await change.database.execute("INSERT INTO note VALUES ('a', 'no')")
        change.put(("a",), "no")
        raise Refused

    async def cancelled(change: Change) -> None:
        await change.database.execute("INSERT INTO note VALUES ('a', 'no')")
        change.put(("a",), "no")
        reached.set()
        await asyncio.sleep(600)

    async def nothing(_: Change) -> str:
        return "seen"

    async with opened(database.url) as notes:
        await notes.write({"b": "1"})
        with pytest.raises(Refused):
            await notes.ledger.change(refuse, actor="test")
        reached = asyncio.Event()
        task = asyncio.create_task(notes.ledger.change(cancelled, actor="test"))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outcome = await notes.ledger.change(nothing, actor="test")
        assert (outcome.result, outcome.revision, outcome.changed) == ("seen", 1, False)
        assert await notes.content() == {("b",): "1"}
        await notes.write({"a": "yes"})
        await assert_consistent(notes, 2)


async def test_a_request_id_counts_once_and_exactly(database: EmptyDatabase) -> None:
    async with opened(database.url) as one, opened(database.url) as two:
        outcomes = await asyncio.gather(
            *(notes.write({"a": f"{number}"}, request_id="same") for number in range(10) for notes in (one, two))
        )
        assert {outcome.revision for outcome in outcomes} == {1}
        assert [outcome.changed for outcome in outcomes].count(True) == 1
        assert (await one.write({"b": "1"}, request_id="SAME")).changed, "another id: ids are compared byte for byte"
        for unusable in ("", "same ", "a" * 65, "ä"):
            with pytest.raises(ValueError, match="request id"):
                await one.write({"c": "1"}, request_id=unusable)
        await assert_consistent(one, 2)


async def test_migrations_by_several_servers_at_once_happen_once(database: EmptyDatabase) -> None:
    async with AsyncExitStack() as stack:
        all_notes = [Notes(await stack.enter_async_context(open_database(database.url))) for _ in range(6)]
        await asyncio.gather(*(notes.migrate() for notes in all_notes))
        assert len({(await notes.ledger.head())[0] for notes in all_notes}) == 1
        steps = [row["id"] for row in await all_notes[0].database.fetch_all("SELECT id FROM migration ORDER BY id")]
        assert steps == ["ledger-1", "notes-1"]


async def test_a_migration_cut_short_is_taken_up_again(database: EmptyDatabase) -> None:
    async with open_database(database.url) as opened_database:
        ledger = Ledger(opened_database, "notes")
        with pytest.raises(Exception, match=r"(?i)nonsense"):
            await ledger.migrate([("notes-1", [NOTES, "NONSENSE"])])
        more = sqlalchemy.Table("more", sqlalchemy.MetaData(), sqlalchemy.Column("id", sqlalchemy.Integer))
        await ledger.migrate([("notes-1", [NOTES, more])])
        assert await opened_database.fetch_all("SELECT * FROM note") == []
        assert await opened_database.fetch_all("SELECT * FROM more") == []


async def test_large_and_odd_values_survive(database: EmptyDatabase) -> None:
    blob = os.urandom(3_000_000)
    texts = {"quote": "'\"\\%s :name %(x)s", "wide": "äöü 漢字 😀", "long": "x" * 60_000}

    async def work(change: Change) -> None:
        change.put(("blob",), blob)
        change.event("note.written", ("blob",), {"text": texts["quote"]})

    async with opened(database.url) as notes:
        await notes.write(texts)
        await notes.ledger.change(work, actor="ä😀")
        first, second = await notes.ledger.log_from(Revision(1))
        assert {key[0]: unpack(data or b"", "log") for key, data in first.changes} == texts
        assert unpack(second.changes[0][1] or b"", "log") == blob
        assert second.events[0]["data"] == {"text": texts["quote"]}
        assert second.actor == "ä😀"
        assert {key[0]: text for key, text in (await notes.content()).items()} == texts


@SERVERS
@pytest.mark.parametrize("when", ["before the commit", "after the commit"])
async def test_a_commit_whose_answer_is_lost_happens_once(database: EmptyDatabase, when: str) -> None:
    """Cut instead of passing on the commit, or its answer; the server has then rolled back, or committed."""
    asked, inserts = False, 0

    def commit_passes(from_server: bool, data: bytes) -> bool:
        nonlocal asked, inserts
        if from_server:
            inserts += data.count(b"INSERT 0 1\x00")
            return asked and when == "after the commit"
        # asyncpg sends the number of a prepared statement: the one after the insertion of the row and of the log entry.
        asked = b"COMMIT" in data if database.kind == "mysql" else inserts == 2
        return asked and when == "before the commit"

    assert database.server is not None
    async with proxy_to(database.server.port) as proxy, opened(database.url_through(proxy.port)) as notes:
        proxy.cut_at = commit_passes
        outcome = await notes.write({"a": "1"})
        assert proxy.cuts == 1
        assert (outcome.result, outcome.revision, outcome.changed) == (1, 1, True)
        assert [key for key, _ in outcome.changes] == [("a",)], "whoever publishes must have it whole"
        for number in range(30):  # more than the pool holds: no connection was lost to it
            await notes.write({"b": str(number)})
        await assert_consistent(notes, 31)


@SERVERS
async def test_connections_cut_again_and_again(database: EmptyDatabase) -> None:
    async def cutting(proxy: Proxy) -> None:
        while True:
            await asyncio.sleep(0.15)
            proxy.cut()

    assert database.server is not None
    async with proxy_to(database.server.port) as proxy, opened(database.url_through(proxy.port)) as notes:
        task = asyncio.create_task(cutting(proxy))
        async with asyncio.timeout(120):
            outcomes = await asyncio.gather(*(notes.write({f"n{number}": "x"}) for number in range(300)))
        task.cancel()
        assert proxy.cuts > 2
        assert sorted(outcome.revision for outcome in outcomes) == list(range(1, 301))
        assert all(outcome.changed for outcome in outcomes)
        await assert_consistent(notes, 300)


KILL: Mapping[str, tuple[str, str]] = {
    "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
    "mysql": ("SELECT CONNECTION_ID()", "KILL {}"),
}


@SERVERS
async def test_a_session_killed_by_the_administrator(database: EmptyDatabase) -> None:
    own_id, kill = KILL[database.kind]
    runs = 0

    async def work(change: Change) -> str:
        nonlocal runs
        runs += 1
        await change.database.execute("INSERT INTO note VALUES ('a', '1')")
        change.put(("a",), "1")
        if runs == 1:
            session = await change.database.fetch_val(own_id)
            async with open_database(database.url) as other:
                await other.execute(kill.format(session))
        return f"run {runs}"

    async with opened(database.url) as notes:
        outcome = await notes.ledger.change(work, actor="test")
        assert (outcome.result, outcome.revision, outcome.changed) == ("run 2", 1, True)
        await assert_consistent(notes, 1)


@SERVERS
async def test_a_restarted_server(database: EmptyDatabase) -> None:
    server = database.server
    assert server is not None
    async with opened(database.url) as notes:
        await notes.write({"a": "0"})

        async def write(number: int) -> int:
            return (await notes.write({f"n{number}": "x"})).revision

        writing = [asyncio.create_task(write(number)) for number in range(200)]
        await asyncio.wait(writing, return_when="FIRST_COMPLETED")
        server.kill()
        await asyncio.sleep(0.5)
        server.launch()
        await asyncio.to_thread(server.wait_ready)
        assert sorted(await asyncio.gather(*writing)) == list(range(2, 202))
        await assert_consistent(notes, 201)


@SERVERS
async def test_deadlock(database: EmptyDatabase) -> None:
    """Two tables' changes lock the same rows in opposite orders: one is chosen as the victim, and tried again."""
    both_hold_one = asyncio.Barrier(2)
    runs = 0

    async def take(notes: Notes, first: str, second: str) -> Revision:
        waited = False

        async def work(change: Change) -> None:
            nonlocal runs, waited
            runs += 1
            update = "UPDATE note SET text = 'taken' WHERE name = :name"
            await change.database.execute(update, {"name": first})
            if not waited:
                waited = True
                await both_hold_one.wait()
            await change.database.execute(update, {"name": second})
            change.put((first,), "taken")

        return (await notes.ledger.change(work, actor="test")).revision

    async with opened(database.url) as one, opened(database.url) as two:
        two.ledger = Ledger(two.database, "other")
        await two.ledger.migrate([])
        await one.write({"a": "1", "b": "1"})
        assert await asyncio.gather(take(one, "a", "b"), take(two, "b", "a")) == [2, 1]
        assert runs == 3


SHORT_LOCK_WAIT = {
    "postgresql": "ALTER DATABASE {} SET lock_timeout = '200ms'",
    "mysql": "SET GLOBAL innodb_lock_wait_timeout = 1",
}


@asynccontextmanager
async def head_locked(url: str) -> AsyncIterator[Database]:
    async with open_database(url) as database, transaction(database, write=True) as connection:
        await connection.execute("UPDATE table_head SET revision = revision WHERE name = 'notes'")
        yield database


async def test_a_lock_wait_that_times_out_is_tried_again(
    database: EmptyDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(database.url):
        pass
    if database.server is None:
        monkeypatch.setattr(bus.database, "BUSY_TIMEOUT_MS", 100)
    else:
        database.server.sql(SHORT_LOCK_WAIT[database.kind].format(database.name))
    try:
        async with open_database(database.url) as opened_database:
            notes = Notes(opened_database)
            async with head_locked(database.url):
                writing = asyncio.create_task(notes.write({"a": "1"}))
                async with asyncio.timeout(30):
                    while "trying again" not in caplog.text:
                        await asyncio.sleep(0.02)
            assert (await writing).revision == 1
    finally:
        if database.kind == "mysql":
            assert database.server is not None
            database.server.sql("SET GLOBAL innodb_lock_wait_timeout = 50")


async def test_a_failed_transaction_gives_its_connection_back(database: EmptyDatabase) -> None:
    async with opened(database.url) as notes:
        for _ in range(30):  # more than a pool holds
            with pytest.raises(Exception, match=r"(?i)syntax|nonsense") as caught:
                async with transaction(notes.database, write=True) as connection:
                    await connection.execute("NONSENSE")
            assert not is_transient(caught.value)
        async with transaction(notes.database, write=False) as connection:
            assert await connection.fetch_val("SELECT 1") == 1


async def test_urls_that_name_nothing_we_know() -> None:
    with pytest.raises(ValueError, match="no kind 'oracle'"):
        async with open_database("oracle://host/name"):
            pass
