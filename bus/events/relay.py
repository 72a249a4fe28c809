"""Carries events from the change log in SQL to the stream; any number of relays at once.

A relay remembers nothing. It reads the end of the stream, finds there the last event that its database knows, and adds
the events that follow in the change log, on condition that the stream still ends where it read. So two relays never
add the same event twice, none is lost however they die, and a stream that was wiped is filled again from the start of
the change log.

A database restored from an older dump, or made anew, goes another way than the stream did. Then the last event that
both have is looked for backwards, and what the database has after it is added. What the stream has and the database
has not stays: it did happen. Readers see the break, since an event's `previous` is then not the id that came before it.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

from nats.js.errors import NoStreamResponseError, ServiceUnavailableError
from prometheus_client import Counter
from tenacity import AsyncRetrying, RetryCallState, wait_random_exponential

from bus.connection import Connection
from bus.events.event import Event, EventId, change_hash, events_of
from bus.events.stream import End, EventStream, JetStream, Overtaken
from bus.log import about
from bus.messages import Revision
from bus.process import check_cancelled

if TYPE_CHECKING:
    from bus.ledger import Ledger, LogEntry

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How soon is carried what another server committed before it died, and how soon a wiped stream is noticed."""
TIMEOUT = 5.0
MAX_BACKOFF = 30.0
OVERTAKEN_SECONDS = 0.1
AT_ONCE = 500
PAGE = 100

RELAYED = Counter("silkbus_events_relayed_total", "Events added to the stream by this process", ["table"])
OVERTAKEN = Counter("silkbus_events_overtaken_total", "Times that another relay was quicker", ["table"])


class Relay:
    """Carries the events of one table.

    `readers` are the components for which a consumer is made; `replicas` is how many servers of a NATS cluster are to
    keep the stream.
    """

    def __init__(
        self, connection: Connection, ledger: "Ledger", *, readers: Iterable[str] = (), replicas: int = 1
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._stream = EventStream(ledger.table, readers=readers, replicas=replicas)
        self._wake = asyncio.Event()
        self._reconnected = asyncio.Event()
        self._searched: tuple[tuple[End, str], EventId | None] | None = None

    def wake(self) -> None:
        """Look at the change log now: something was committed. Returns at once, whatever the bus does."""
        self._wake.set()

    async def run(self) -> None:
        """Carry events for ever. Whatever fails is logged and tried again, with back-off."""
        self._connection.on_connect(self._reconnected.set)
        while True:
            if not await self._connection.wait_connected(POLL_SECONDS):
                continue
            self._reconnected.clear()
            async for attempt in AsyncRetrying(
                wait=wait_random_exponential(0.2, max=MAX_BACKOFF), before_sleep=self._say, sleep=self._pause
            ):
                with attempt:
                    self._wake.clear()
                    await self._catch_up()
            await _wait(self._wake, POLL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 (spreads load)

    async def _catch_up(self) -> None:
        """Add events until the stream ends with the last one of the change log."""
        wait = OVERTAKEN_SECONDS
        while True:
            check_cancelled()
            jetstream = self._connection.jetstream(TIMEOUT)
            epoch, head = await self._ledger.head()
            end = await self._stream.end(jetstream)
            previous = await self._last_known(jetstream, end, _Log(self._ledger, epoch, head))
            try:
                check_cancelled()
                async for events in self._following(previous, epoch):
                    await self._stream.append(jetstream, end, events, previous)
                    RELAYED.labels(self._ledger.table).inc(len(events))
                    end, previous = end.after(len(events)), events[-1].id
                    check_cancelled()
                    log.debug("events relayed", extra=self._about(events=len(events), last=str(previous)))
            except Overtaken:
                # The other one is at work: let it go on, rather than race it for every event.
                OVERTAKEN.labels(self._ledger.table).inc()
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311 (spreads load)
                wait = min(2 * wait, POLL_SECONDS)
                continue
            return

    async def _following(self, previous: EventId | None, epoch: str) -> AsyncIterator[Sequence[Event]]:
        """The events of the change log after `previous`, some at a time."""
        place = (Revision(-1), 0) if previous is None else (previous.revision, previous.index)
        revision = max(place[0], Revision(0))
        while entries := await self._ledger.log_from(revision, limit=PAGE):
            found = (event for entry in entries for event in events_of(self._ledger.table, epoch, entry))
            events = [event for event in found if (event.id.revision, event.id.index) > place]
            for start in range(0, len(events), AT_ONCE):
                yield events[start : start + AT_ONCE]
            revision = Revision(entries[-1].revision + 1)

    async def _last_known(self, jetstream: JetStream, end: End, known: "_Log") -> EventId | None:
        """The last event of the stream that is in the database's change log, or None when none is."""
        searching = False
        async for found in self._stream.backwards(jetstream, end):
            if found is not None and await known.holds(found):
                if searching:
                    log.info("the stream and the database part after this event", extra=self._about(event=str(found)))
                    self._searched = (end, await known.last()), found
                return found
            if not searching:
                searching = True
                if self._searched is not None and self._searched[0] == (end, await known.last()):
                    return self._searched[1]  # a long search, and nothing has changed since
                log.warning(
                    "the stream does not end with an event of this database", extra=self._about(last=str(found))
                )
        if searching:
            self._searched = (end, await known.last()), None
        return None

    async def _pause(self, seconds: float) -> None:
        """Wait before trying again, but not beyond the next connection."""
        await _wait(self._reconnected, seconds)
        self._reconnected.clear()

    def _say(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        fields = self._about(attempt=state.attempt_number, error=repr(error))
        if isinstance(error, (ServiceUnavailableError, NoStreamResponseError)):
            fields["about"]["advice"] = "start nats-server with JetStream (-js), and let this user call it"
        log.warning("events not relayed, trying again; policies and leases do not need them", extra=fields)

    def _about(self, **fields: object) -> dict[str, dict[str, object]]:
        return about(table=self._ledger.table, stream=self._stream.name, **fields)


class _Log:
    """The events that a change log holds, looked up from its end to its start: read a page at a time."""

    def __init__(self, ledger: "Ledger", epoch: str, head: Revision) -> None:
        self._ledger = ledger
        self._epoch = epoch
        self._head = head
        self._page: dict[int, LogEntry] = {}
        self._read: range = range(0)

    async def holds(self, event: EventId) -> bool:
        """Whether this very event is in it."""
        if event.table != self._ledger.table or not 0 < event.revision <= self._head:
            return False
        if event.revision not in self._read:
            # One alone at first, since nearly always it is the last one; more when a search goes on.
            first = event.revision if not self._read else max(1, event.revision - PAGE + 1)
            self._read = range(first, event.revision + 1)
            entries = await self._ledger.log_from(Revision(first), limit=len(self._read))
            self._page = {entry.revision: entry for entry in entries}
        entry = self._page.get(event.revision)
        return entry is not None and event.index < len(entry.events) and event.change == change_hash(self._epoch, entry)

    async def last(self) -> str:
        """What identifies its last change, and with it all of them; empty for an empty one."""
        entries = await self._ledger.log_from(self._head, limit=1)
        return change_hash(self._epoch, entries[0]) if entries else self._epoch


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until `event` is set, or for `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
