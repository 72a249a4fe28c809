"""The database side of a table: every change is one transaction with one revision.

The first statement of each write is the update of the table's head. Its row lock makes the order of revisions the order
of commits, without gaps, on SQLite, PostgreSQL and MySQL alike (sequences become visible out of order). The rows, the
change log and the domain events are written in the same transaction. A write that changes nothing is rolled back.

The whole transaction is repeated when the database says deadlock or busy, or loses the connection. Each change carries
a request id, unique in the log, so repeating one whose commit succeeded, but whose answer was lost, finds it there and
does nothing.

The outbox of domain events is a column of the change log: the same rows, the same retention, one insert instead of two.
"""

import logging
import secrets
import time
from asyncio import Lock
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import sqlalchemy
from databases import Database
from databases.core import Connection as DatabaseConnection
from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, String, UniqueConstraint
from sqlalchemy.schema import CreateTable, DDLElement
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from bus.database import is_sqlite, is_transient
from bus.log import about
from bus.messages import Revision
from bus.tables.table import Changes, Content, Key, as_changes
from bus.wire import pack, unpack

log = logging.getLogger(__name__)

R = TypeVar("R")
RETRY_SECONDS = 15.0
MAX_REQUEST_ID = 64
_MIGRATION_LOCK = 7_417_355
_BLOB = LargeBinary(length=2**32 - 1)  # MySQL chooses the type by the length

_metadata = MetaData()
MIGRATION = sqlalchemy.Table("migration", _metadata, Column("id", String(64), primary_key=True))
TABLE_HEAD = sqlalchemy.Table(
    "table_head",
    _metadata,
    Column("name", String(64), primary_key=True),
    Column("epoch", String(32), nullable=False),
    Column("revision", BigInteger, nullable=False),
)
CHANGE_LOG = sqlalchemy.Table(
    "change_log",
    _metadata,
    Column("table_name", String(64), primary_key=True),
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("request_id", String(MAX_REQUEST_ID), nullable=False),
    Column("actor", String(255), nullable=False),
    Column("changed_at_ms", BigInteger, nullable=False),
    Column("changes", _BLOB, nullable=False),
    Column("events", _BLOB, nullable=False),
    UniqueConstraint("table_name", "request_id"),
)

Step = tuple[str, Sequence[sqlalchemy.Table | DDLElement | str]]
"""A migration: its id, unique and never changed again, and what it runs."""
_LEDGER_STEPS: Sequence[Step] = (("ledger-1", (TABLE_HEAD, CHANGE_LOG)),)


@dataclass(slots=True)
class Change:
    """One change being made, inside its transaction.

    `database` runs SQL in the transaction. `put` and `delete` say what becomes of the table's entries; `event` what
    happened, for other components. A key's last word counts.
    """

    database: DatabaseConnection
    revision: Revision
    _entries: dict[Key, bytes | None] = field(default_factory=dict)
    _events: list[dict[str, Any]] = field(default_factory=list)

    def put(self, key: Key, value: Any) -> None:
        self._entries[key] = pack(value)

    def delete(self, key: Key) -> None:
        self._entries[key] = None

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        self._events.append({"kind": kind, "data": dict(data)})


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R]):
    """What came of a change: the result of its work, and the revision that contains it.

    `changed` is False when the work changed nothing; `revision` is then the one it found. For a request id that was
    committed before, by another call, `result` is None.
    """

    result: R | None
    revision: Revision
    changed: bool
    request_id: str
    changes: Changes = ()


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One row of the change log. `events` are maps with `kind` and `data`."""

    revision: Revision
    request_id: str
    actor: str
    changed_at_ms: int
    changes: Changes
    events: tuple[Mapping[str, Any], ...]


class _Unchanged(Exception):
    """Carries the result out of a transaction that must be rolled back."""


class Ledger:
    """The head and change log of one table in one database.

    Several servers may have ledgers on the same table; within one process there should be one, since SQLite's writers
    wait for each other far better in a queue here than for the file's lock.
    """

    def __init__(self, database: Database, table: str) -> None:
        self.database = database
        self.table = table
        self._queue = Lock() if is_sqlite(database) else None

    async def migrate(self, steps: Sequence[Step]) -> None:
        """Bring the schema up to date: the ledger's own tables, then each of `steps` that was not applied yet.

        Safe when several servers start at once. A new database gets a new epoch.
        """
        async for attempt in self._retrying("migrating"):
            with attempt:
                await self._migrate([*_LEDGER_STEPS, *steps])

    async def _migrate(self, steps: Sequence[Step]) -> None:
        async with self.database.connection() as connection, AsyncExitStack() as stack:
            dialect = self.database.url.dialect
            if dialect == "mysql":  # where DDL commits by itself, so that the lock must outlive transactions
                await connection.execute("SELECT GET_LOCK('silkbus-migration', 60)")
                stack.push_async_callback(connection.execute, "SELECT RELEASE_LOCK('silkbus-migration')")
            await stack.enter_async_context(connection.transaction())
            if dialect == "postgresql":
                await connection.execute(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            await connection.execute(CreateTable(MIGRATION, if_not_exists=True))
            applied = {row["id"] for row in await connection.fetch_all("SELECT id FROM migration")}
            for name, statements in steps:
                if name in applied:
                    continue
                log.info("applying a migration", extra=about(migration=name))
                for statement in statements:
                    command = CreateTable(statement) if isinstance(statement, sqlalchemy.Table) else statement
                    await connection.execute(command)
                await connection.execute("INSERT INTO migration (id) VALUES (:id)", {"id": name})
            head = await connection.fetch_one("SELECT 1 FROM table_head WHERE name = :name", {"name": self.table})
            if head is None:
                await connection.execute(
                    "INSERT INTO table_head (name, epoch, revision) VALUES (:name, :epoch, 0)",
                    {"name": self.table, "epoch": secrets.token_hex(16)},
                )

    async def change(
        self, work: Callable[[Change], Awaitable[R]], *, actor: str, request_id: str | None = None
    ) -> Outcome[R]:
        """Run `work` in one write transaction under the table's head lock.

        `work` may run several times, and must change nothing but the database. What it raises rolls back and is
        raised here. Raises the database's error when it still cannot be reached after RETRY_SECONDS.
        """
        request_id = request_id or secrets.token_hex(16)
        made: list[Outcome[R]] = []
        async for attempt in self._retrying("changing"):
            with attempt:
                async with AsyncExitStack() as stack:
                    if self._queue is not None:
                        await stack.enter_async_context(self._queue)
                    return await self._change(work, actor, request_id, made)
        raise AssertionError("retrying ends by returning or raising")

    async def _change(
        self, work: Callable[[Change], Awaitable[R]], actor: str, request_id: str, made: list[Outcome[R]]
    ) -> Outcome[R]:
        async with self.database.connection() as connection:
            try:
                async with connection.transaction():
                    outcome = await self._write(connection, work, actor, request_id, made)
                    if not outcome.changed:
                        raise _Unchanged
                    made.append(outcome)
            except _Unchanged:
                pass
            return outcome

    async def _write(
        self,
        connection: DatabaseConnection,
        work: Callable[[Change], Awaitable[R]],
        actor: str,
        request_id: str,
        made: list[Outcome[R]],
    ) -> Outcome[R]:
        where = {"name": self.table}
        await connection.execute("UPDATE table_head SET revision = revision + 1 WHERE name = :name", where)
        revision = await connection.fetch_val("SELECT revision FROM table_head WHERE name = :name", where)
        if revision is None:
            raise LookupError(f"table_head has no row {self.table!r}: run the migrations first")
        same = {"name": self.table, "id": request_id}
        query = "SELECT revision FROM change_log WHERE table_name = :name AND request_id = :id"
        if (before := await connection.fetch_val(query, same)) is not None:
            # Made by this call, whose answer was lost, or by an earlier one with the same id.
            mine = next((outcome for outcome in made if outcome.revision == before), None)
            return Outcome(mine.result if mine else None, Revision(before), False, request_id)
        change = Change(connection, Revision(revision))
        result = await work(change)
        if not change._entries:
            return Outcome(result, Revision(revision - 1), False, request_id)
        changes = tuple(change._entries.items())
        await connection.execute(
            "INSERT INTO change_log (table_name, revision, request_id, actor, changed_at_ms, changes, events)"
            " VALUES (:name, :revision, :id, :actor, :at, :changes, :events)",
            {
                **same,
                "revision": revision,
                "actor": actor[:255],
                "at": int(time.time() * 1000),
                "changes": pack([[list(key), data] for key, data in changes]),
                "events": pack(change._events),
            },
        )
        return Outcome(result, Revision(revision), True, request_id, changes)

    async def head(self) -> tuple[str, Revision]:
        """The table's epoch and revision."""
        row = await self.database.fetch_one(
            "SELECT epoch, revision FROM table_head WHERE name = :name", {"name": self.table}
        )
        if row is None:
            raise LookupError(f"table_head has no row {self.table!r}: run the migrations first")
        return row["epoch"], Revision(row["revision"])

    async def log_from(self, revision: Revision, *, limit: int = 1000) -> list[LogEntry]:
        """The log from `revision` on, that one included, in order, at most `limit` entries."""
        rows = await self.database.fetch_all(
            "SELECT revision, request_id, actor, changed_at_ms, changes, events FROM change_log"
            " WHERE table_name = :name AND revision >= :revision ORDER BY revision LIMIT :limit",
            {"name": self.table, "revision": revision, "limit": limit},
        )
        return [
            LogEntry(
                Revision(row["revision"]),
                row["request_id"],
                row["actor"],
                row["changed_at_ms"],
                as_changes(unpack(row["changes"], "change log")),
                tuple(unpack(row["events"], "change log")),
            )
            for row in rows
        ]

    async def content(
        self, entries: Callable[[DatabaseConnection], Awaitable[Mapping[Key, Any]]]
    ) -> tuple[Content, str]:
        """The table's content, read by `entries` from its rows in one consistent view, and its last request id."""
        # PostgreSQL's default sees each statement's own moment; the other two see the transaction's.
        isolation: dict[str, Any] = {}
        if self.database.url.dialect == "postgresql":
            isolation = {"isolation": "repeatable_read"}
        where = {"name": self.table}
        async with self.database.connection() as connection, connection.transaction(**isolation):
            head = await connection.fetch_one("SELECT epoch, revision FROM table_head WHERE name = :name", where)
            if head is None:
                raise LookupError(f"table_head has no row {self.table!r}: run the migrations first")
            last = await connection.fetch_val(
                "SELECT request_id FROM change_log WHERE table_name = :name AND revision = :revision",
                {**where, "revision": head["revision"]},
            )
            values = await entries(connection)
        packed = {key: pack(value) for key, value in values.items()}
        return Content.of(head["epoch"], Revision(head["revision"]), packed), cast("str | None", last) or ""

    def _retrying(self, doing: str) -> AsyncRetrying:
        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            fields = about(table=self.table, attempt=state.attempt_number, error=repr(error))
            log.warning("%s the database failed, trying again", doing, extra=fields)

        return AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_delay(RETRY_SECONDS),
            wait=wait_random_exponential(0.01, max=1),
            before_sleep=say,
            reraise=True,
        )
