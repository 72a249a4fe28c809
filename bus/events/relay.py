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
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nats.js.errors import NoStreamResponseError, ServiceUnavailableError
from prometheus_client import Counter
from tenacity import AsyncRetrying, RetryCallState, wait_random_exponential

from bus.connection import Connection
from bus.events.event import Event, EventId, change_hash, events_of
from bus.events.stream import End, EventStream, JetStream, Overtaken
from bus.log import about
from bus.messages import Revision

if TYPE_CHECKING:
    from bus.ledger import Ledger

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
        self._searched: tuple[tuple[End, str, str], EventId | None] | None = None

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
        while True:
            jetstream = self._connection.jetstream(TIMEOUT)
            epoch, _ = await self._ledger.head()
            end = await self._stream.end(jetstream)
            previous = await self._last_known(jetstream, end, epoch)
            events = await self._following(previous, epoch)
            if not events:
                return
            try:
                await self._stream.append(jetstream, end, events, previous)
            except Overtaken:
                # The other one is at work: let it go on, rather than race it for every event.
                OVERTAKEN.labels(self._ledger.table).inc()
                await asyncio.sleep(OVERTAKEN_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 (spreads load)
                continue
            RELAYED.labels(self._ledger.table).inc(len(events))
            log.debug("events relayed", extra=self._about(events=len(events), last=str(events[-1].id)))

    async def _following(self, previous: EventId | None, epoch: str) -> Sequence[Event]:
        """The next events of the change log, not all at once; none when there are no more."""
        revision = Revision(0) if previous is None else previous.revision
        while entries := await self._ledger.log_from(revision, limit=PAGE):
            events = [event for entry in entries for event in events_of(self._ledger.table, epoch, entry)]
            if previous is not None:
                events = [event for event in events if (event.id.revision, event.id.index) > _place(previous)]
            if events:
                return events[:AT_ONCE]
            revision = Revision(entries[-1].revision + 1)
        return ()

    async def _last_known(self, jetstream: JetStream, end: End, epoch: str) -> EventId | None:
        """The last event of the stream that is in the database's change log, or None when none is."""
        searching = False
        async for found in self._stream.backwards(jetstream, end):
            if found is not None and await self._holds(found, epoch):
                if searching:
                    log.info("the stream and the database part after this event", extra=self._about(event=str(found)))
                    self._searched = await self._history(end, epoch), found
                return found
            if not searching:
                searching = True
                if self._searched is not None and self._searched[0] == await self._history(end, epoch):
                    return self._searched[1]  # a long search, and nothing has changed since
                log.warning(
                    "the stream does not end with an event of this database", extra=self._about(last=str(found))
                )
        if searching:
            self._searched = await self._history(end, epoch), None
        return None

    async def _history(self, end: End, epoch: str) -> tuple[End, str, str]:
        """What a search depends on: the stream, and the changes that the database holds."""
        _, revision = await self._ledger.head()
        last = await self._ledger.log_from(revision, limit=1)
        return end, epoch, change_hash(epoch, last[0]) if last else ""

    async def _holds(self, event: EventId, epoch: str) -> bool:
        """Whether this very event is in the change log."""
        if event.table != self._ledger.table:
            return False
        entries = await self._ledger.log_from(event.revision, limit=1)
        return any(event == known.id for entry in entries for known in events_of(self._ledger.table, epoch, entry))

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


def _place(event: EventId) -> tuple[Revision, int]:
    return event.revision, event.index


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until `event` is set, or for `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
