"""Opening a SQL database, and transactions whose connection is always given back, on all three kinds.

SQLite is the embedded default. `databases` opens one connection per task, so its settings are made where sqlite3 itself
makes a connection: WAL (readers never block the writer), synchronous FULL (a commit survives power loss), a busy
timeout, foreign keys on. PostgreSQL is spoken to by asyncpg, MySQL and MariaDB by aiomysql.

No statement waits for ever: the server is told a limit, and since a server that hangs, or that the network has cut off,
does not keep it, each statement has one here, too. A connection that did not answer in time is closed.

The transactions of `databases` are not used: when BEGIN, COMMIT or ROLLBACK fails, they never give the connection back,
and the task that tries again is handed the same dead one. Here a connection whose transaction did not end cleanly is
closed, so the next try has a fresh one and the server lets go of the locks.
"""

import asyncio
import errno
import logging
import re
import socket
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any

from databases import Database, DatabaseURL
from databases.core import Connection
from databases.interfaces import DatabaseBackend, Record
from sqlalchemy.sql import ClauseElement

from bus.database_options import DatabaseOptions
from bus.log import about

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 10_000
ROLLBACK_TIMEOUT = 5.0
IDLE_TRANSACTION_SECONDS = 30

Query = ClauseElement | str
_PARAMETER = re.compile(r"(?<![:\w\\]):(\w+)(?!:)")
"""A named parameter, as SQLAlchemy's text() sees one."""

_WRITE = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "BEGIN ISOLATION LEVEL READ COMMITTED",
    "mysql": "START TRANSACTION",
}
_READ = {
    "sqlite": "BEGIN",
    "postgresql": "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    "mysql": "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
}
_EXTRAS = {"postgresql": "postgresql", "mysql": "mysql"}
"""The optional dependency of this project that brings the driver of each kind."""


class _SqliteConnection(sqlite3.Connection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = FULL")
        self.execute("PRAGMA foreign_keys = ON")


class _LimitedConnection(Connection):
    """A connection that is given up when it is not there, or does not answer, in time.

    To PostgreSQL, SQL given as text goes straight: `databases` would have SQLAlchemy take it apart and put it together
    again each time, which takes as long as the server does. What is found is read in the same way, by column.
    """

    def __init__(self, database: "LimitedDatabase", backend: DatabaseBackend) -> None:
        super().__init__(database, backend)
        self._limits = database.limits
        self._numbers = database.url.dialect == "postgresql"

    async def __aenter__(self) -> "Connection":
        seconds = self._limits.connect_timeout if self._limits else None
        try:
            async with asyncio.timeout(seconds):
                connection = await super().__aenter__()
        except TimeoutError:
            self._database._connection = None
            raise TimeoutError(f"no connection to the database within {seconds:g} s") from None
        except BaseException:
            self._database._connection = None
            raise
        raw = self.raw_connection
        # aiomysql says everything in the clear when the server does not offer TLS.
        secret = self._limits is not None and self._limits.tls != "off"
        if secret and hasattr(raw, "_writer") and raw._writer.get_extra_info("ssl_object") is None:
            close(self)
            await super().__aexit__()
            raise NoTls("the database offers no TLS, but database_tls asks for it")
        return connection

    async def fetch_all(self, query: Query, values: dict[str, Any] | None = None) -> list[Record]:
        async with self._limit():
            if self._numbers and isinstance(query, str):
                text, arguments = numbered(query, values)
                async with self._query_lock:
                    found: list[Record] = await self.raw_connection.fetch(text, *arguments)
                    return found
            return await super().fetch_all(query, values)

    async def fetch_one(self, query: Query, values: dict[str, Any] | None = None) -> Record | None:
        async with self._limit():
            if self._numbers and isinstance(query, str):
                text, arguments = numbered(query, values)
                async with self._query_lock:
                    found: Record | None = await self.raw_connection.fetchrow(text, *arguments)
                    return found
            return await super().fetch_one(query, values)

    async def fetch_val(self, query: Query, values: dict[str, Any] | None = None, column: Any = 0) -> Any:
        row = await self.fetch_one(query, values)
        return None if row is None else row[column]

    async def execute(self, query: Query, values: dict[str, Any] | None = None) -> Any:
        async with self._limit():
            if self._numbers and isinstance(query, str):
                text, arguments = numbered(query, values)
                async with self._query_lock:
                    return await self.raw_connection.fetchval(text, *arguments)
            return await super().execute(query, values)

    @asynccontextmanager
    async def _limit(self) -> AsyncIterator[None]:
        if self._limits is None:
            yield
            return
        seconds = self._limits.statement_timeout
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            close(self)
            raise TimeoutError(f"the database has not answered a statement within {seconds:g} s") from None


def numbered(query: str, values: Mapping[str, Any] | None) -> tuple[str, list[Any]]:
    """The query with PostgreSQL's parameters, $1, $2…, in place of `:name`, and their values."""
    text, names = _numbered(query)
    return text, [(values or {})[name] for name in names]


@lru_cache(maxsize=1000)
def _numbered(query: str) -> tuple[str, tuple[str, ...]]:
    names: dict[str, int] = {}
    text = _PARAMETER.sub(lambda found: f"${names.setdefault(found[1], len(names) + 1)}", query)
    return text, tuple(names)


class LimitedDatabase(Database):
    """A database whose connections and statements have time limits; `limits` is None for SQLite, which has its own."""

    def __init__(self, url: str, limits: DatabaseOptions | None, **options: Any) -> None:
        super().__init__(url, **options)
        self.limits = limits

    def connection(self) -> Connection:
        if self._connection is None:
            self._connection = _LimitedConnection(self, self._backend)
        return self._connection


class NoTls(Exception):
    """The server offers no TLS."""


@asynccontextmanager
async def open_database(url: str, options: DatabaseOptions | None = None) -> AsyncIterator[Database]:
    """The database at `url` (`sqlite:///file`, `postgresql://…`, `mysql://…`), connected while inside.

    Raises ValueError for another kind of URL or an unusable certificate, RuntimeError when the driver is not installed,
    or what the driver raises when the server cannot be reached.
    """
    dialect = DatabaseURL(url).dialect
    options = options or DatabaseOptions()
    make = {"sqlite": _sqlite, "postgresql": _postgresql, "mysql": _mysql}.get(dialect)
    if make is None:
        raise ValueError(
            f"database URL: no kind {dialect!r}; use sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME "
            f"or mysql://USER:PASSWORD@HOST/NAME"
        )
    try:
        database = LimitedDatabase(url, None if dialect == "sqlite" else options, **make(options))
    except ImportError as error:
        raise RuntimeError(f"no driver for {dialect}: pip install 'silkbus[{_EXTRAS[dialect]}]' ({error})") from error
    async with asyncio.timeout(2 * options.connect_timeout):
        await database.connect()
    try:
        yield database
    finally:
        try:
            async with asyncio.timeout(options.connect_timeout):
                await database.disconnect()
        except TimeoutError:
            log.warning("the database does not take its leave", extra=about(kind=dialect))


def _sqlite(_: DatabaseOptions) -> dict[str, Any]:
    return {"factory": _SqliteConnection}


def _postgresql(options: DatabaseOptions) -> dict[str, Any]:
    limit = int(options.statement_timeout * 1000)
    return {
        "min_size": 1,
        "max_size": options.connections,
        "timeout": options.connect_timeout,
        "command_timeout": options.statement_timeout,
        "max_inactive_connection_lifetime": options.connection_lifetime,
        "ssl": options.tls_context() or False,
        "server_settings": {
            "application_name": "silkbus",
            "statement_timeout": str(limit),
            # One that hangs amid a transaction must not keep the head locked for all others.
            "idle_in_transaction_session_timeout": str(IDLE_TRANSACTION_SECONDS * 1000),
        },
    }


def _mysql(options: DatabaseOptions) -> dict[str, Any]:
    seconds = options.statement_timeout
    # Each kind reads its own part as a command, and the other's as a comment: MariaDB skips 50700 and later.
    own = (
        f"/*M! tx_isolation='REPEATABLE-READ', max_statement_time={seconds:g}, "
        f"idle_transaction_timeout={IDLE_TRANSACTION_SECONDS}, */"
        f"/*!50720 transaction_isolation='REPEATABLE-READ', max_execution_time={int(seconds * 1000)}, */"
    )
    return {
        "charset": "utf8mb4",
        "max_size": options.connections,
        # Its own limit would be asyncio.wait_for, which before Python 3.12 may lose a cancellation, here our limit's.
        "connect_timeout": None,
        "pool_recycle": int(max(1, options.connection_lifetime)),
        "ssl": options.tls_context(),
        "init_command": f"SET SESSION {own} innodb_lock_wait_timeout={max(1, int(seconds))}",
    }


@asynccontextmanager
async def transaction(database: Database, *, write: bool) -> AsyncIterator[Connection]:
    """One transaction: committed when the block ends, rolled back when it raises.

    With `write`, each statement sees what was committed before it (after the first lock: everything), and SQLite's one
    writer is taken at once. Without, all statements see one moment. What `database` does in the same task inside the
    block belongs to the transaction; a second one cannot be begun.
    """
    begin = (_WRITE if write else _READ)[database.url.dialect]
    try:
        async with database.connection() as connection:
            try:
                await connection.execute(begin)
                yield connection
                await connection.execute("COMMIT")
            except BaseException as error:
                await _abandon(connection, error)
                raise
    except BaseException:
        # When giving it back failed, `databases` would keep the connection for this task.
        database._connection = None
        raise


async def _abandon(connection: Connection, error: BaseException) -> None:
    """End the transaction that `error` broke, with the connection if need be."""
    if isinstance(error, Exception):
        with suppress(Exception):
            async with asyncio.timeout(ROLLBACK_TIMEOUT):
                await connection.execute("ROLLBACK")
            return
        log.debug("cannot roll back, closing the connection", extra=about(error=repr(error)))
    close(connection)


def close(connection: Connection) -> None:
    """End the connection's session at once, without a word to the server. It must still be given back."""
    with suppress(Exception):  # it may be closed already
        raw = connection.raw_connection
        if hasattr(raw, "terminate"):  # asyncpg
            raw.terminate()
        elif not asyncio.iscoroutinefunction(raw.close):  # aiomysql; aiosqlite's is closed when it is given back
            raw.close()


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is tried again: busy, deadlock, or a lost connection."""
    if isinstance(error, sqlite3.Error):
        return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)
    match type(error).__module__.partition(".")[0]:
        case "asyncpg":
            return _is_transient_postgresql(error)
        case "pymysql":
            return _is_transient_mysql(error)
    return False


def _is_transient_postgresql(error: BaseException) -> bool:
    """By SQLSTATE (PostgreSQL manual, appendix A), or by what asyncpg says of its own."""
    state = getattr(error, "sqlstate", None)
    if type(error).__name__ == "InternalClientError":
        # What a session ended by the server between two statements may leave behind. The next try has another one.
        return True
    if not isinstance(state, str):
        return re.search("connection (is|was) closed|has been released back", str(error)) is not None
    # Classes 08 (connection) and 40 (serialisation, deadlock); 57P (shutdown), 53300 (too many connections), 55P03
    # (lock timeout), 25P03 (idle in a transaction for too long). 0A000 comes when another server migrated the schema
    # under a prepared statement.
    if state == "0A000":
        return type(error).__name__ == "InvalidCachedStatementError"
    return state[:2] in ("08", "40") or state[:3] == "57P" or state in ("25P03", "53300", "55P03")


def _is_transient_mysql(error: BaseException) -> bool:
    """By error number (MariaDB's and MySQL's references of server and client errors)."""
    if type(error).__name__ == "InterfaceError":  # aiomysql: not connected (any more)
        return True
    # 1020 row changed since the snapshot, 1040 too many connections, 1053 shutdown, 1158 to 1161 network, 1205 lock
    # wait, 1213 deadlock, 1927 connection killed, 2002 to 2013 no or lost connection, 4031 idle for too long.
    transient = (1020, 1040, 1053, 1158, 1159, 1160, 1161, 1205, 1213, 1927, 2002, 2003, 2006, 2013, 4031)
    return bool(error.args) and error.args[0] in transient


def is_already_there(error: BaseException) -> bool:
    """Whether MySQL says that what a migration makes exists: a table, a column, an index."""
    is_mysql = type(error).__module__.startswith("pymysql")
    return is_mysql and bool(error.args) and error.args[0] in (1050, 1060, 1061)


def is_missing(error: BaseException) -> bool:
    """Whether the database says that there is no such table."""
    if isinstance(error, sqlite3.OperationalError):
        return str(error).startswith("no such table")
    if type(error).__module__.startswith("pymysql"):
        return bool(error.args) and error.args[0] == 1146
    return getattr(error, "sqlstate", None) == "42P01"
