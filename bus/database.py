"""Opening a SQL database so that a committed transaction is on disk, on all three kinds.

SQLite is the embedded default. `databases` opens one connection per task, so its settings are made where sqlite3 itself
makes a connection: WAL (readers never block the writer), synchronous FULL (a commit survives power loss), a busy
timeout, foreign keys on.
"""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from databases import Database

BUSY_TIMEOUT_MS = 10_000


class _SqliteConnection(sqlite3.Connection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = FULL")
        self.execute("PRAGMA foreign_keys = ON")


def is_sqlite(database: Database) -> bool:
    return bool(database.url.dialect == "sqlite")


@asynccontextmanager
async def open_database(url: str) -> AsyncIterator[Database]:
    """The database at `url` (`sqlite:///file`, `postgresql://…`, `mysql://…`), connected while inside."""
    options: dict[str, Any] = {"factory": _SqliteConnection} if url.startswith("sqlite") else {}
    database = Database(url, **options)
    await database.connect()
    try:
        yield database
    finally:
        await database.disconnect()


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is tried again: busy, deadlock, or a lost connection."""
    if isinstance(error, sqlite3.OperationalError):
        return "locked" in str(error) or "busy" in str(error)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    # asyncpg: SQLSTATE classes 08 (connection), 40 (serialisation, deadlock), 57P (shutdown), 55P03 (lock timeout).
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return state[:2] in ("08", "40") or state[:3] == "57P" or state == "55P03"
    # MySQL: 1205 lock wait timeout, 1213 deadlock, 2006 and 2013 server gone, 2003 cannot connect, 1053 shutdown.
    match error.args:
        case [int(code), *_] if type(error).__module__.startswith(("pymysql", "asyncmy")):
            return code in (1205, 1213, 2003, 2006, 2013, 1053)
    return False
