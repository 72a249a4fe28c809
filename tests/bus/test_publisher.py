"""What a server says of its table is what SQL holds, whatever happens to SQL; what it cannot vouch for it does not."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bus.connection import Connection, connect
from bus.decode import Fields
from bus.ledger import Ledger
from bus.tables import publisher as publishing
from bus.wire import decode, pack
from tests.bus.tables import Centre, centre, dump, eventually, follower, restore
from tests.nats_server import NatsServer


@asynccontextmanager
async def listening(nats: str, kind: str) -> AsyncIterator[list[Fields]]:
    heard: list[Fields] = []
    async with connect(nats, role="reader", name=kind) as connection:
        await connection.listen(
            f"silkbus.table.notes.{kind}", lambda subject, data: heard.append(decode(data, subject))
        )
        assert await connection.wait_connected(30)
        yield heard


async def ask(connection: Connection, epoch: str | None, since: int) -> Fields:
    async for part in connection.collect("silkbus.table.notes.fetch", {"epoch": epoch, "since": since}, timeout=10):
        return part
    raise AssertionError("no answer")


async def commit_unseen(here: Centre, count: int) -> None:
    """Commit `count` changes at once, as other servers do while this one sees nothing of the database."""
    database = here.notes.database
    async with database.transaction():
        head = await database.fetch_val("SELECT revision FROM table_head WHERE name = 'notes'")
        rows = [
            {
                "table": "notes",
                "revision": head + number,
                "id": secrets.token_hex(8),
                "changes": pack([[["a"], pack(str(head + number))]]),
                "events": pack([]),
            }
            for number in range(1, count + 1)
        ]
        await database.execute_many(
            "INSERT INTO change_log (table_name, revision, request_id, actor, changed_at_ms, changes, events)"
            " VALUES (:table, :revision, :id, 'other', 0, :changes, :events)",
            rows,
        )
        await database.execute("DELETE FROM note WHERE name = 'a'")
        await database.execute("INSERT INTO note VALUES ('a', :text)", {"text": str(head + count)})
        await database.execute(
            "UPDATE table_head SET revision = :revision WHERE name = 'notes'", {"revision": head + count}
        )


async def test_it_vouches_for_nothing_before_it_has_read_all(nats_server: NatsServer, tmp_path: Path) -> None:
    """A server back from an outage must not lead replicas back to what it held before, nor through all of it."""
    async with (
        centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here,
        listening(nats_server.url, "heartbeat") as heartbeats,
    ):
        await eventually(lambda: heartbeats)
        await commit_unseen(here, 3 * publishing.PAGE + 7)
        await eventually(lambda: heartbeats[-1].integer("revision") > 0)
        assert {beat.integer("revision") for beat in heartbeats} == {0, 3 * publishing.PAGE + 7}


async def test_a_database_that_hangs_stops_the_heartbeats_but_not_the_changes(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "DATABASE_SECONDS", 2.0)
    async with (
        centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here,
        follower(nats_server.url) as there,
        listening(nats_server.url, "heartbeat") as heartbeats,
    ):
        await there.replica.usable()
        await eventually(lambda: heartbeats)
        hanging = asyncio.Event()
        head = Ledger.head

        async def hang(_: Ledger) -> Any:
            hanging.set()
            await asyncio.sleep(3600)

        monkeypatch.setattr(Ledger, "head", hang)
        await asyncio.wait_for(hanging.wait(), 10)
        count = len(heartbeats)
        await here.write(a="meanwhile")
        await eventually(lambda: there.replica.entries == {("a",): "meanwhile"}, timeout=2)
        answer = await ask(there.connection, None, -1)
        await asyncio.sleep(1.5)
        assert (await ask(there.connection, None, -1)).number("age") >= answer.number("age") + 1.4
        assert len(heartbeats) == count
        monkeypatch.setattr(Ledger, "head", head)
        await eventually(lambda: len(heartbeats) > count + 2)
        assert (await ask(there.connection, None, -1)).number("age") < 3


async def test_a_database_that_is_away_and_comes_back(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "notes.db"
    async with centre(nats_server.url, f"sqlite:///{file}") as here, follower(nats_server.url) as there:
        await here.write(a="1")
        await eventually(lambda: there.replica.revision == 1)
        file.rename(tmp_path / "away")  # each look makes a new connection, and finds an empty database
        await eventually(lambda: "cannot read the table" in caplog.text)
        await eventually(lambda: there.replica.state == "cached")
        assert there.replica.entries == {("a",): "1"}
        for leftover in tmp_path.glob("notes.db*"):
            leftover.unlink()
        (tmp_path / "away").rename(file)
        await eventually(lambda: there.replica.state == "live")
        assert caplog.text.count("cannot read the table") == 1
        await here.write(a="2")
        await eventually(lambda: there.replica.entries == {("a",): "2"})


async def test_a_restore_is_noticed_also_under_commits_of_its_own(nats_server: NatsServer, tmp_path: Path) -> None:
    """The database goes back, others write another history, and then this server commits what would follow its own."""
    url = f"sqlite:///{tmp_path}/notes.db"
    async with centre(nats_server.url, url) as here, follower(nats_server.url) as there:
        for number in range(5):
            await here.write(a=str(number))
        await eventually(lambda: there.replica.revision == 5)
        publisher = here.publisher
        await eventually(lambda: publisher._read[0] == 5)
        async with here.notes.database.transaction():
            await here.notes.database.execute("UPDATE change_log SET request_id = 'another' WHERE revision = 5")
            await here.notes.database.execute("UPDATE note SET text = 'another history' WHERE name = 'a'")
        await here.write(b="follows")
        await eventually(lambda: there.replica.entries == {("a",): "another history", ("b",): "follows"})


async def test_replicas_behind_a_restarted_server_get_changes_not_the_whole_table(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/notes.db"
    async with centre(nats_server.url, url) as here:
        for number in range(5):
            await here.write(a=str(number))
        epoch, _ = await here.notes.ledger.head()
    async with centre(nats_server.url, url) as here, follower(nats_server.url) as there:
        await there.replica.usable()
        for since, kind in ((5, "current"), (4, "changes"), (0, "changes"), (-1, "snapshot"), (6, "snapshot")):
            assert (await ask(there.connection, epoch, since)).text("kind") == kind
        assert (await ask(there.connection, "another", 4)).text("kind") == "snapshot"


async def test_memory_for_past_changes_is_bounded(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "KEPT_ENTRIES", 25)
    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here, follower(nats_server.url) as there:
        for number in range(12):
            await here.write(**{f"{number}-{letter}": "x" for letter in "abcde"})
        await eventually(lambda: there.replica.revision == 12)
        epoch, _ = await here.notes.ledger.head()
        assert (await ask(there.connection, epoch, 7)).text("kind") == "changes"
        assert (await ask(there.connection, epoch, 6)).text("kind") == "snapshot"


async def test_a_recheck_that_finds_no_difference_changes_nothing(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publishing, "RECHECK_SECONDS", 0.5)
    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here, follower(nats_server.url) as there:
        await here.write(a="1")
        await eventually(lambda: there.replica.revision == 1)
        checked = here.publisher._checked_at
        await eventually(lambda: here.publisher._checked_at > checked)
        assert "differed" not in caplog.text
        # A row changed behind the ledger's back has no revision, and is found only by this.
        await here.notes.database.execute("UPDATE note SET text = 'changed by hand' WHERE name = 'a'")
        begun = time.monotonic()
        await eventually(lambda: there.replica.entries == {("a",): "changed by hand"})
        assert "the mirror differed from the database" in caplog.text
        assert time.monotonic() - begun < 30


async def test_a_dump_of_before_the_first_change(nats_server: NatsServer, tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    async with centre(nats_server.url, f"sqlite:///{file}") as here, follower(nats_server.url) as there:
        await eventually(lambda: here.publisher.revision == 0)
        dump(file, tmp_path / "dump")
        await here.write(a="1")
        await eventually(lambda: there.replica.revision == 1)
        restore(file, tmp_path / "dump")
        await eventually(lambda: there.replica.entries == {})
        await here.write(b="2")
        await eventually(lambda: there.replica.entries == {("b",): "2"})
