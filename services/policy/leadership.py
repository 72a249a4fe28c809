"""One of several servers leads: what all could do is done once. The database, which they share anyway, says who.

A row names the holder and until when, by the database's clock; the holder extends it all the while. One that was killed
is succeeded when its time is over, one that ends in order at once. Each succession begins a new term.

A holder that was paused does not know that it was succeeded. So whatever it writes is fenced: the write's own
transaction looks whether its term still is the present one, and locks the row, so that nobody succeeds it before that
transaction has ended. (SQLite has one writer at a time, which comes to the same.)
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from databases import Database
from databases.core import Connection as DatabaseConnection

from bus.database import transaction
from bus.log import about

log = logging.getLogger(__name__)

R = TypeVar("R")
Fence = Callable[[DatabaseConnection], Awaitable[None]]
"""Run inside a write transaction; raises Deposed when the writer may not write any more."""

HOLD_SECONDS = 6.0
RENEW_SECONDS = 2.0
LOOK_SECONDS = 1.0
"""How long a lead lasts unless extended, how often it is extended, and how often the others look."""
RESTART_SECONDS = 5.0
"""After how long duties that failed are begun again."""

NOW_MS = {
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
    "mysql": "CAST(UNIX_TIMESTAMP(SYSDATE(3)) * 1000 AS SIGNED)",
}
"""The database's clock: when the statement comes to it, not when its transaction began or it began to wait."""


class Deposed(Exception):
    """Another server has begun to lead."""


@dataclass(frozen=True, slots=True)
class Term:
    """From one succession to the next. Numbers only grow."""

    number: int


class Leadership:
    """One server's part in `duty`, a row of silkbus_leader."""

    def __init__(self, database: Database, duty: str) -> None:
        self._database = database
        self._duty = duty
        self._holder = secrets.token_hex(16)
        self._now = NOW_MS[database.url.dialect]
        self._lock = "" if database.url.dialect == "sqlite" else " FOR UPDATE"
        self._trouble = ""
        self.term: Term | None = None

    async def run(self, duties: Callable[[Fence], Coroutine[Any, Any, None]]) -> None:
        """Do the duties, as a task, whenever this server leads; for ever."""
        try:
            while True:
                if await self._free() and (term := await self._hold()) is not None:
                    await self._lead(term, duties)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await self._release()

    async def _lead(self, term: Term, duties: Callable[[Fence], Coroutine[Any, Any, None]]) -> None:
        """Do the duties until another leads, or may lead since the database could not be told that we do."""
        self.term = term
        log.info("leading", extra=about(duty=self._duty, term=term.number))

        async def fence(database: DatabaseConnection) -> None:
            await self._check(term, database)

        until = time.monotonic() + HOLD_SECONDS
        task = asyncio.create_task(duties(fence))
        try:
            while time.monotonic() < until:
                await asyncio.wait({task}, timeout=RENEW_SECONDS)
                if task.done():
                    log.error("failed, beginning again", extra=about(duty=self._duty, error=repr(task.exception())))
                    await asyncio.sleep(RESTART_SECONDS)
                    return
                asked = time.monotonic()
                held = await self._hold()
                if held == term:
                    until = asked + HOLD_SECONDS
                elif held is not None or not self._trouble:
                    break
            log.warning("leading no more", extra=about(duty=self._duty, term=term.number, error=self._trouble))
        finally:
            self.term = None
            task.cancel()
            await asyncio.wait({task})

    async def _free(self) -> bool:
        """Whether nobody else leads, as far as can be told without writing."""
        query = (
            f"SELECT 1 FROM silkbus_leader WHERE duty = :duty AND (holder = :holder OR expires_at_ms <= {self._now})"  # noqa: S608
        )
        values = {"duty": self._duty, "holder": self._holder}
        return await self._asking(self._database.fetch_val(query, values)) is not None

    async def _hold(self) -> Term | None:
        """Begin to lead, or go on: the term, or None when another leads or the database does not answer."""
        return await self._asking(self._extend())

    async def _extend(self) -> Term | None:
        # The term first: MySQL assigns from left to right, and would compare with the new holder.
        update = (
            "UPDATE silkbus_leader SET term = CASE WHEN holder = :holder THEN term ELSE term + 1 END,"  # noqa: S608
            f" holder = :holder, expires_at_ms = {self._now} + :hold"
            f" WHERE duty = :duty AND (holder = :holder OR expires_at_ms <= {self._now})"
        )
        values = {"duty": self._duty, "holder": self._holder, "hold": int(HOLD_SECONDS * 1000)}
        async with transaction(self._database, write=True) as connection:
            await connection.execute(update, values)
            row = await self._read(connection)
        return Term(row["term"]) if row["holder"] == self._holder else None

    async def _check(self, term: Term, database: DatabaseConnection) -> None:
        """Raises Deposed unless this is the present term, and will be until the transaction ends."""
        row = await self._read(database, lock=self._lock)
        if (row["holder"], row["term"]) != (self._holder, term.number):
            raise Deposed(f"{self._duty}: term {term.number} is over, another server leads in term {row['term']}")

    async def _read(self, database: DatabaseConnection, lock: str = "") -> Any:
        query = f"SELECT holder, term FROM silkbus_leader WHERE duty = :duty{lock}"  # noqa: S608 (our own text)
        row = await database.fetch_one(query, {"duty": self._duty})
        if row is None:
            raise LookupError(f"silkbus_leader has no row {self._duty!r}: run the migrations first")
        return row

    async def _release(self) -> None:
        """Let another lead at once."""
        query = "UPDATE silkbus_leader SET expires_at_ms = 0 WHERE duty = :duty AND holder = :holder"
        await self._asking(self._database.execute(query, {"duty": self._duty, "holder": self._holder}))

    async def _asking(self, question: Coroutine[Any, Any, R]) -> R | None:
        """The database's answer to the question, or None when it fails or takes too long."""
        # In a task of its own, since `databases` keeps connections, also broken ones, by task.
        task = asyncio.create_task(question)
        try:
            await asyncio.wait({task}, timeout=RENEW_SECONDS)
        finally:
            task.cancel()
        if not task.done():
            error = f"the database does not answer within {RENEW_SECONDS:g} s"
        else:
            error = repr(task.exception()) if task.exception() else ""
        if error and error != self._trouble:
            log.warning("cannot tell who leads", extra=about(duty=self._duty, error=error))
        self._trouble = error
        return None if error else task.result()
