"""A small table in SQL for the tests of the bus: texts by name, written through a ledger, published, followed."""

import asyncio
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy
from databases import Database
from databases.core import Connection as DatabaseConnection

from bus.connection import Connection, connect
from bus.credentials import Credentials
from bus.database import open_database
from bus.decode import Malformed
from bus.ledger import Change, Ledger, Outcome
from bus.tables import Key, Publisher, Replica, Table, Update

NOTES = sqlalchemy.Table(
    "note",
    sqlalchemy.MetaData(),
    sqlalchemy.Column("name", sqlalchemy.String(64), primary_key=True),
    sqlalchemy.Column("text", sqlalchemy.Text, nullable=False),
    mysql_charset="utf8mb4",
    mysql_collate="utf8mb4_bin",
)


def _decode(key: Key, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise Malformed(f"note {key}: not text")


TABLE: Table[str] = Table("notes", _decode)


async def entries(connection: DatabaseConnection) -> Mapping[Key, Any]:
    return {(row["name"],): row["text"] for row in await connection.fetch_all("SELECT name, text FROM note")}


class Notes:
    """The service that owns the table."""

    def __init__(self, database: Database, table: str = TABLE.name) -> None:
        self.database = database
        self.ledger = Ledger(database, table)

    async def migrate(self) -> None:
        await self.ledger.migrate([("notes-1", [NOTES])])

    async def write(self, changes: Mapping[str, str | None], request_id: str | None = None) -> Outcome[int]:
        async def work(change: Change) -> int:
            for name, text in changes.items():
                old = await change.database.fetch_val("SELECT text FROM note WHERE name = :n", {"n": name})
                if old == text:
                    continue
                await change.database.execute("DELETE FROM note WHERE name = :n", {"n": name})
                if text is None:
                    change.delete((name,))
                    continue
                await change.database.execute("INSERT INTO note VALUES (:n, :t)", {"n": name, "t": text})
                change.put((name,), text)
                change.event("note.written", (name,), {"name": name})
            return change.revision

        return await self.ledger.change(work, actor="test", request_id=request_id)

    async def content(self) -> dict[Key, str]:
        async with self.database.connection() as connection:
            return dict(await entries(connection))


def dump(database: Path, to: Path) -> None:
    """Copy an SQLite database, whoever has it open: what is only in its write-ahead log comes along."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def restore(database: Path, dumped: Path) -> None:
    """Put a dump in its place, as new files: whoever still has the old ones open cannot write to it."""
    for old in database.parent.glob(f"{database.name}*"):
        old.unlink()
    shutil.copy(dumped, database)


@dataclass
class Centre:
    """One server: its notes and their publisher."""

    notes: Notes
    publisher: Publisher[str]

    async def write(self, **changes: str | None) -> Outcome[int]:
        outcome = await self.notes.write(changes)
        self.publisher.committed(outcome)
        return outcome


@asynccontextmanager
async def centre(
    nats: str, url: str, *, table: Table[str] = TABLE, role: str = "server", credentials: Credentials | None = None
) -> AsyncIterator[Centre]:
    async with AsyncExitStack() as stack:
        notes = Notes(await stack.enter_async_context(open_database(url)), table.name)
        await notes.migrate()
        connection = await stack.enter_async_context(connect(nats, role=role, name="notes", credentials=credentials))
        publisher = Publisher(connection, notes.ledger, table, entries)
        stack.push_async_callback(cancel, asyncio.create_task(publisher.run()))
        yield Centre(notes, publisher)


@dataclass
class Follower:
    replica: Replica[str]
    connection: Connection
    updates: list[Update[str]] = field(default_factory=list)


@asynccontextmanager
async def follower(
    nats: str,
    cache: Path | None = None,
    *,
    table: Table[str] = TABLE,
    name: str = "one",
    credentials: Credentials | None = None,
    **options: Any,
) -> AsyncIterator[Follower]:
    async with connect(nats, role="cell", name=name, credentials=credentials) as connection:
        following = Follower(Replica(connection, table, cache=cache, **options), connection)
        following.replica.listen(following.updates.append)
        task = asyncio.create_task(following.replica.run())
        yield following
        await cancel(task)


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], Any], timeout: float = 30) -> None:
    """Wait until `condition` holds; its value is what a failure shows."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {condition}"
        await asyncio.sleep(0.01)
