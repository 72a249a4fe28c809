"""A replica of a table on a cell: the follower's decisions carried out over NATS, its state kept on disk."""

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

from bus import subjects
from bus.connection import BusAway, Connection, NoAnswer
from bus.decode import Fields, Malformed
from bus.log import about
from bus.messages import Revision
from bus.tables import cache
from bus.tables.follower import START_SECONDS, Follower, State
from bus.tables.table import Key, Table, Update
from bus.wire import decode

log = logging.getLogger(__name__)

V = TypeVar("V")

ANSWER_TIMEOUT = 5.0
ANSWER_SECONDS = 30.0
"""How long the next part of an answer may take, and all of them: nothing else is decided meanwhile."""
MAX_PARTS = 10_000
MAX_TABLE_BYTES = 1 << 30
CONFIRM_SAVE_SECONDS = 60.0
"""How often an unchanged state is written again, so that its time of confirmation does not grow old on disk."""
RETRY_SAVE_SECONDS = 10.0
SAVE_SECONDS = 0.05
MAX_STALE = 7 * 24 * 3600.0


def boot_clock() -> float:
    """Seconds since boot, counted through suspend: a clock that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Replica(Generic[V]):
    """Follows `table`. Listen first, then `run` it in a task; nothing may be derived before `usable` returns.

    `cache` is the file that keeps the last state. In seconds: `max_stale`, how old a state may be that the centre has
    not confirmed since; `patience`, how long to wait for the centre at the start. Listeners are called in the event
    loop and must not block.
    """

    def __init__(
        self,
        connection: Connection,
        table: Table[V],
        *,
        cache: Path | None = None,
        max_stale: float = MAX_STALE,
        patience: float = START_SECONDS,
    ) -> None:
        self._connection = connection
        self._table = table
        self._cache = cache
        self._max_stale = max_stale
        self._patience = patience
        self._listeners: list[Callable[[Update[V]], None]] = []
        self._follower: Follower[V] | None = None
        self._usable = asyncio.Event()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def entries(self) -> Mapping[Key, V]:
        return {} if self._follower is None else self._follower.entries

    @property
    def revision(self) -> Revision:
        return Revision(0) if self._follower is None else self._follower.revision

    @property
    def epoch(self) -> str:
        """The database's, of which the entries are; empty before the first."""
        return "" if self._follower is None else self._follower.content.epoch

    @property
    def state(self) -> State:
        return State.STARTING if self._follower is None else self._follower.state

    def listen(self, listener: Callable[[Update[V]], None]) -> None:
        """Have every update from now on; one that listens before `run` misses none."""
        self._listeners.append(listener)

    async def usable(self) -> None:
        """Return once the replica is live, or started from its cache, or empty for want of both."""
        await self._usable.wait()

    async def run(self) -> None:
        """Follow for ever. What a listener raises ends it, and is raised here."""
        cached = await asyncio.to_thread(cache.load, self._cache, self._table.name) if self._cache else None
        follower = self._follower = Follower(
            self._table,
            self._emit,
            now=boot_clock(),
            max_stale=self._max_stale,
            patience=self._patience,
            content=cached.content if cached else None,
            age=cached.age if cached else None,
        )
        self._connection.on_connect(self._on_connect)
        await self._connection.listen(subjects.table_change(self._table.name), self._on_change)
        await self._connection.listen(subjects.table_heartbeat(self._table.name), self._on_heartbeat)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(follower))
            tasks.create_task(self._keep_saving(follower))

    async def _follow(self, follower: Follower[V]) -> None:
        while self._failure is None:
            follower.tick(boot_clock())
            if follower.ask_at is not None and follower.ask_at <= boot_clock():
                await self._ask(follower)
            if follower.state is not State.STARTING:
                self._usable.set()
            self._wake.clear()
            wait = 1.0 if follower.ask_at is None else min(1.0, max(0.0, follower.ask_at - boot_clock()))
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                pass
        raise self._failure

    async def _ask(self, follower: Follower[V]) -> None:
        ask = follower.begin_ask()
        message = {"epoch": ask.epoch or None, "since": ask.since}
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                head, data = await self._collect(message)
            follower.on_answer(head, data, boot_clock())
        except (BusAway, NoAnswer, TimeoutError) as error:
            log.debug("the centre did not answer", extra=about(table=self._table.name, error=repr(error)))
            follower.on_no_answer(boot_clock())
        except (Malformed, zlib.error) as error:
            log.error("the centre's answer is refused", extra=about(table=self._table.name, error=str(error)))
            follower.on_no_answer(boot_clock())

    async def _collect(self, message: Mapping[str, object]) -> tuple[Fields, bytes]:
        """All parts of one answer: the first's head, and the data joined and uncompressed."""
        subject = subjects.table_fetch(self._table.name)
        parts: dict[int, bytes] = {}
        first: Fields | None = None
        async for fields in self._connection.collect(subject, message, timeout=ANSWER_TIMEOUT):
            first = first or fields
            count = fields.integer("parts", low=1, high=MAX_PARTS)
            parts[fields.integer("part", high=count - 1)] = fields.data("data")
            if len(parts) == count:
                break
        if first is None:
            raise NoAnswer(f"no answer to {subject}")
        joined = b"".join(parts[number] for number in range(len(parts)))
        return first, decompress(joined)

    def _emit(self, update: Update[V]) -> None:
        self._changed.set()
        for listener in self._listeners:
            listener(update)

    def _on_change(self, subject: str, data: bytes) -> None:
        if self._follower is not None:
            self._hear(self._follower.on_change, subject, data)

    def _on_heartbeat(self, subject: str, data: bytes) -> None:
        if self._follower is not None:
            self._hear(self._follower.on_heartbeat, subject, data)

    def _hear(self, decide: Callable[[Fields, float], None], subject: str, data: bytes) -> None:
        try:
            decide(decode(data, subject), boot_clock())
        except Malformed:
            raise
        except Exception as error:  # noqa: BLE001 (raised again, by `run`)
            # The client would log it and go on, and a listener would have missed an update for good.
            self._failure = error
        self._wake.set()

    def _on_connect(self) -> None:
        if self._follower is not None:
            self._follower.on_connect(boot_clock())
            self._wake.set()

    async def _keep_saving(self, follower: Follower[V]) -> None:
        """Write the state after it changed, or was confirmed a while; busy for a twentieth of the time at most."""
        if self._cache is None:
            return
        wait = SAVE_SECONDS
        while True:
            # Wakes for a change, so that little is lost if the process dies, and idle costs nothing.
            with suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_SAVE_SECONDS):
                    await self._changed.wait()
            await asyncio.sleep(wait)  # what else changes now is written with it
            if follower.confirmed_at is None or not follower.content.epoch:
                self._changed.clear()
                continue
            begun = boot_clock()
            self._changed.clear()
            # A copy, made at once, since packing a large table takes longer than the event loop should be kept waiting.
            content = replace(follower.content, entries=dict(follower.content.entries))
            age = begun - follower.confirmed_at
            try:
                await asyncio.to_thread(cache.store, self._cache, content, self._table.name, age)
            except OSError as error:
                self._changed.set()
                log.error("table cache not written", extra=about(file=str(self._cache), error=str(error)))
                wait = RETRY_SAVE_SECONDS
                continue
            wait = max(SAVE_SECONDS, 20 * (boot_clock() - begun))


def decompress(data: bytes) -> bytes:
    """What `data`, one or more zlib streams one after the other, unpacks to. Raises Malformed or zlib.error."""
    plain: list[bytes] = []
    left = MAX_TABLE_BYTES
    while data:
        engine = zlib.decompressobj()
        plain.append(engine.decompress(data, left))
        left -= len(plain[-1])
        if engine.unconsumed_tail or not engine.eof or left <= 0:
            raise Malformed(f"answer: does not unpack to a whole table of at most {MAX_TABLE_BYTES} bytes")
        data = engine.unused_data
    return b"".join(plain)
