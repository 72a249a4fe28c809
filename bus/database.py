"""Opening a SQL database, and transactions whose connection is always given back, on all three kinds.

SQLite is the embedded default. `databases` opens one connection per task, so its settings are made where sqlite3 itself
makes a connection: WAL (readers never block the writer), synchronous FULL (a commit survives power loss), a busy
timeout, foreign keys on. PostgreSQL is spoken to by asyncpg, MySQL and MariaDB by aiomysql.

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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from databases import Database, DatabaseURL
from databases.core import Connection

from bus.log import about

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 10_000
ROLLBACK_TIMEOUT = 5.0

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
_MYSQL_ISOLATION = "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ"
_EXTRAS = {"postgresql": "postgresql", "mysql": "mysql"}
"""The optional dependency of this project that brings the driver of each kind."""


class _SqliteConnection(sqlite3.Connection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = FULL")
        self.execute("PRAGMA foreign_keys = ON")


@asynccontextmanager
async def open_database(url: str) -> AsyncIterator[Database]:
    """The database at `url` (`sqlite:///file`, `postgresql://…`, `mysql://…`), connected while inside.

    Raises ValueError for another kind of URL, RuntimeError when the driver is not installed, or what the driver raises
    when the server cannot be reached.
    """
    dialect = DatabaseURL(url).dialect
    options: dict[str, Any]
    match dialect:
        case "sqlite":
            options = {"factory": _SqliteConnection}
        case "postgresql":
            options = {"min_size": 1}
        case "mysql":
            options = {"charset": "utf8mb4", "init_command": _MYSQL_ISOLATION}
        case _:
            raise ValueError(
                f"database URL: no kind {dialect!r}; use sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME "
                f"or mysql://USER:PASSWORD@HOST/NAME"
            )
    try:
        database = Database(url, **options)
    except ImportError as error:
        raise RuntimeError(f"no driver for {dialect}: pip install 'silkbus[{_EXTRAS[dialect]}]' ({error})") from error
    await database.connect()
    try:
        yield database
    finally:
        await database.disconnect()


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
