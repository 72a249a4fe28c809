"""The database side of a table: every change is one transaction with one revision.

The first statement of each write is the update of the table's head. Its row lock makes the order of revisions the order
of commits, without gaps, on SQLite, PostgreSQL and MySQL alike (sequences become visible out of order). The rows, the
change log and the domain events are written in the same transaction. A write that changes nothing is rolled back.

The whole transaction is repeated when the database says deadlock or busy, or loses the connection. Each change carries
a request id, unique in the log, so repeating one whose commit succeeded, but whose answer was lost, finds it there and
does nothing.

Within a process one change is made at a time: they would wait for the same lock anyway, and like this they wait in
order, without holding the connections that readers need.

The outbox of domain events is a column of the change log: the same rows, the same retention, one insert instead of two.
"""

import asyncio
import logging
import math
import re
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager, suppress
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

from bus.database import is_already_there, is_missing, is_transient, transaction
from bus.log import about
from bus.messages import Revision
from bus.tables.table import Changes, Content, Key, as_changes
from bus.wire import pack, unpack

log = logging.getLogger(__name__)

R = TypeVar("R")
RETRY_SECONDS = 15.0
_NEVER: Exception = TimeoutError()
QUEUE_SECONDS = 30.0
MIGRATION_SECONDS = 60
COMPRESSED_FROM = 16_384
MAX_REQUEST_ID = 64
_REQUEST_ID = re.compile(r"[!-~]{1,64}")
_MIGRATION_LOCK = 7_417_355
_BLOB = LargeBinary(length=2**32 - 1)  # MySQL chooses the type by the length

_EXACT: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
"""MySQL compares texts without regard to case unless told so, and not every engine of its has transactions."""

_metadata = MetaData()
MIGRATION = sqlalchemy.Table("migration", _metadata, Column("id", String(64), primary_key=True), **_EXACT)
TABLE_HEAD = sqlalchemy.Table(
    "table_head",
    _metadata,
    Column("name", String(64), primary_key=True),
    Column("epoch", String(32), nullable=False),
    Column("revision", BigInteger, nullable=False),
    **_EXACT,
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
    **_EXACT,
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

    def event(self, kind: str, about: Key, data: Mapping[str, Any]) -> None:
        """Tell other components that `kind`, say "policy.added", happened to the entry `about` (docs/events.md)."""
        self._events.append({"kind": kind, "about": list(about), "data": dict(data)})


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
    changed_at_ms: int = 0
    """Unix time at which it was written down; 0 when nothing was."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One row of the change log. `events` are maps with `kind`, `about` (a key of the table) and `data`."""

    revision: Revision
    request_id: str
    actor: str
    changed_at_ms: int
    changes: Changes
    events: tuple[Mapping[str, Any], ...]


class SchemaTooNew(Exception):
    """The database was migrated by a later version of this program."""

    def __init__(self, unknown: Sequence[str]) -> None:
        super().__init__(
            f"the schema is newer than this program, which does not know {', '.join(unknown)}: upgrade the program, or "
            f"use another database; to go back by one minor version, set database_newer_schema"
        )


class _Unchanged(Exception):
    """Carries the result out of a transaction that must be rolled back."""


class Ledger:
    """The head and change log of one table in one database.

    Several servers may have ledgers on the same table; a process should have one of each.
    """

    def __init__(self, database: Database, table: str, *, patience: float = RETRY_SECONDS) -> None:
        """`patience` is for how many seconds a change or reading is tried while the database is away."""
        self.database = database
        self.table = table
        self._patience = patience
        self._queue = asyncio.Lock()
        self._given_up = -math.inf, _NEVER

    async def migrate(self, steps: Sequence[Step], *, newer: bool = False) -> None:
        """Bring the schema up to date: the ledger's own tables, then each of `steps` that was not applied yet.

        Safe when several servers start at once. A new database gets a new epoch. Raises SchemaTooNew, unless `newer`
        says that a schema with steps unknown here is to be used as it is.
        """
        async for attempt in self._retrying("migrating", RETRY_SECONDS):
            with attempt:
                async with (
                    self.database.connection() as connection,
                    _migrating_alone(connection, self._dialect),
                    transaction(self.database, write=True),
                ):
                    await self._migrate(connection, [*_LEDGER_STEPS, *steps], newer)

    async def pending(self, steps: Sequence[Step]) -> list[str]:
        """The ids of the steps that `migrate` would run, in order. Raises SchemaTooNew."""
        async for attempt in self._retrying("reading the migrations", self._patience):
            with attempt:
                try:
                    applied = {row["id"] for row in await self.database.fetch_all("SELECT id FROM migration")}
                except Exception as error:
                    if not is_missing(error):
                        raise
                    applied = set()
        known = [*_LEDGER_STEPS, *steps]
        if unknown := _unknown(applied, known):
            raise SchemaTooNew(unknown)
        return [name for name, _ in known if name not in applied]

    async def _migrate(self, connection: DatabaseConnection, steps: Sequence[Step], newer: bool) -> None:
        if self._dialect == "postgresql":
            await connection.execute(f"SET LOCAL lock_timeout = '{MIGRATION_SECONDS}s'")
            await connection.execute(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
        await connection.execute(CreateTable(MIGRATION, if_not_exists=True))
        applied = {row["id"] for row in await connection.fetch_all("SELECT id FROM migration")}
        unknown = _unknown(applied, steps)
        if unknown and not newer:
            raise SchemaTooNew(unknown)
        if unknown:
            log.warning("the schema is newer than this program; going on with it", extra=about(unknown=unknown))
        for name, statements in steps:
            if name in applied:
                continue
            log.info("applying a migration", extra=about(migration=name))
            for statement in statements:
                command = CreateTable(statement) if isinstance(statement, sqlalchemy.Table) else statement
                try:
                    await connection.execute(command)
                except Exception as error:
                    # MySQL cannot roll back DDL: an earlier run of this step was cut short after this statement.
                    if not is_already_there(error):
                        raise
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
        raised here. Raises ValueError for a request id that is not 1 to 64 printable ASCII characters without blanks,
        TimeoutError when other changes of this process have kept it waiting for QUEUE_SECONDS, and the database's
        error when that still stands after the ledger's patience; also when it was so for a change that this one waited
        for, since then it has waited long enough.
        """
        request_id = request_id if request_id is not None else secrets.token_hex(16)
        if not _REQUEST_ID.fullmatch(request_id):  # MySQL takes "a" and "a " for the same
            raise ValueError(f"request id: {request_id!r} is not 1 to 64 printable ASCII characters without blanks")
        made: list[Outcome[R]] = []
        asked = time.monotonic()
        async with self._turn():
            given_up, error = self._given_up
            if asked < given_up:
                raise type(error)(*error.args) from error
            try:
                async for attempt in self._retrying("changing", self._patience):
                    with attempt:
                        return await self._change(work, actor, request_id, made)
            except Exception as error:
                if is_transient(error):
                    self._given_up = time.monotonic(), error
                raise
        raise AssertionError("retrying ends by returning or raising")

    async def read(self, work: Callable[[DatabaseConnection], Awaitable[R]]) -> R:
        """What `work` reads in one consistent view. It may run several times; raises what the database raises."""
        async for attempt in self._retrying("reading", self._patience):
            with attempt:
                async with transaction(self.database, write=False) as connection:
                    return await work(connection)
        raise AssertionError("retrying ends by returning or raising")

    async def write(self, work: Callable[[DatabaseConnection], Awaitable[R]]) -> R:
        """Run `work` in one write transaction that is no change of the table: it has no revision, nobody hears of it.

        It may run several times, and beside changes; raises what the database raises.
        """
        async for attempt in self._retrying("writing", self._patience):
            with attempt:
                async with transaction(self.database, write=True) as connection:
                    return await work(connection)
        raise AssertionError("retrying ends by returning or raising")

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._queue.acquire()
        except TimeoutError:
            raise TimeoutError(
                f"table {self.table}: earlier changes have not ended within {QUEUE_SECONDS:g} s; see whether the "
                f"database answers, and who holds its locks"
            ) from None
        try:
            yield
        finally:
            self._queue.release()

    async def _change(
        self, work: Callable[[Change], Awaitable[R]], actor: str, request_id: str, made: list[Outcome[R]]
    ) -> Outcome[R]:
        try:
            async with transaction(self.database, write=True) as connection:
                outcome = await self._write(connection, work, actor, request_id, made)
                if not outcome.changed or any(outcome is earlier for earlier in made):
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
        same = {"name": self.table, "id": request_id}
        await connection.execute(
            "UPDATE table_head SET revision = revision + 1 WHERE name = :name", {"name": self.table}
        )
        head = await connection.fetch_one(
            "SELECT h.revision, l.revision AS made FROM table_head h LEFT JOIN change_log l"
            " ON l.table_name = h.name AND l.request_id = :id WHERE h.name = :name",
            same,
        )
        if head is None:
            raise LookupError(f"table_head has no row {self.table!r}: run the migrations first")
        revision = head["revision"]
        if (before := head["made"]) is not None:
            # Made by an earlier try of this call, whose commit was not answered, or by another call with the same id.
            mine = next((outcome for outcome in reversed(made) if outcome.revision == before), None)
            return mine or Outcome(None, Revision(before), False, request_id)
        change = Change(connection, Revision(revision))
        result = await work(change)
        if not change._entries:
            return Outcome(result, Revision(revision - 1), False, request_id)
        changes = tuple(change._entries.items())
        now = int(time.time() * 1000)
        await connection.execute(
            "INSERT INTO change_log (table_name, revision, request_id, actor, changed_at_ms, changes, events)"
            " VALUES (:name, :revision, :id, :actor, :at, :changes, :events)",
            {
                **same,
                "revision": revision,
                "actor": actor[:255],
                "at": now,
                "changes": await _encode([[list(key), data] for key, data in changes]),
                "events": await _encode(change._events),
            },
        )
        return Outcome(result, Revision(revision), True, request_id, changes, now)

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
                as_changes(decode_logged(row["changes"])),
                tuple(decode_logged(row["events"])),
            )
            for row in rows
        ]

    async def last_changed(self) -> int:
        """The latest time in the change log, as Unix time in ms; 0 for an empty one."""
        found = await self.database.fetch_val(
            "SELECT MAX(changed_at_ms) FROM change_log WHERE table_name = :name", {"name": self.table}
        )
        return int(found or 0)

    async def content(
        self, entries: Callable[[DatabaseConnection], Awaitable[Mapping[Key, Any]]]
    ) -> tuple[Content, str]:
        """The table's content, read by `entries` from its rows in one consistent view, and its last request id."""
        where = {"name": self.table}
        async with transaction(self.database, write=False) as connection:
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

    @property
    def _dialect(self) -> str:
        return str(self.database.url.dialect)

    def _retrying(self, doing: str, seconds: float) -> AsyncRetrying:
        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            fields = about(table=self.table, attempt=state.attempt_number, error=repr(error))
            log.warning("%s the database failed, trying again", doing, extra=fields)

        return AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_delay(seconds),
            wait=wait_random_exponential(0.01, max=1),
            before_sleep=say,
            reraise=True,
        )


def _unknown(applied: AbstractSet[str], steps: Sequence[Step]) -> list[str]:
    """The applied steps that are not among `steps`.

    Those of another series, NAME-1, NAME-2…, belong to another table in the same database.
    """
    known = {name for name, _ in steps}
    series = {name.rpartition("-")[0] for name in known}
    return sorted(name for name in applied - known if name.rpartition("-")[0] in series)


async def _encode(items: Sequence[Any]) -> bytes:
    """A list for the change log; a long one compressed, since MySQL takes only 16 MB at once."""
    packed = pack(items)
    return await asyncio.to_thread(zlib.compress, packed, 1) if len(packed) > COMPRESSED_FROM else packed


def decode_logged(data: bytes) -> list[Any]:
    """The list that a column of the change log holds. Raises Malformed."""
    # zlib's first byte would be the number 120 in msgpack, and a list never begins with it.
    items: list[Any] = unpack(zlib.decompress(data) if data[:1] == b"x" else data, "change log")
    return items


@asynccontextmanager
async def _migrating_alone(connection: DatabaseConnection, dialect: str) -> AsyncIterator[None]:
    """On MySQL, where DDL commits by itself, hold a lock that outlives transactions; the others lock in theirs."""
    if dialect != "mysql":
        yield
        return
    if await connection.fetch_val(f"SELECT GET_LOCK('silkbus-migration', {MIGRATION_SECONDS})") != 1:
        raise TimeoutError(f"another server has been migrating the database for {MIGRATION_SECONDS} s")
    try:
        yield
    finally:
        with suppress(Exception):  # with the connection gone, so is the lock
            await connection.execute("SELECT RELEASE_LOCK('silkbus-migration')")
