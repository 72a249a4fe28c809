"""The events of policies and leases for the CLI and other clients of the API, who need no NATS credentials then.

Policy events are read from the change log, so a client that comes back with the last id it saw misses none (ids are
those of docs/events.md). Leases are another service's: what the server hears of them is told as it happens, without an
id, and what happened while a client was away is not told again.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from bus.events.event import Event, EventId, change_hash, events_of
from bus.ledger import Ledger
from bus.messages import Lease, Revision
from bus.tables import Key, Publisher, Replica, Update
from bus.tables.publisher import Mirrored
from services.policy.sse import event

PAGE = 100
MAX_LEASE_EVENTS = 1000
"""Lease events that wait for one client; one that is further behind is cut off."""
LOOK_SECONDS = 10.0


class EventFeed:
    """Makes the events of one stream after the other."""

    def __init__(self, ledger: Ledger, publisher: Publisher[Any], leases: Replica[Lease]) -> None:
        self._ledger = ledger
        self._changed = asyncio.Event()
        self._queues: set[_Queue] = set()
        self._known: dict[Key, Lease] = {}
        self._histories = 0
        """How often the database was found to hold another history than before."""
        self._read = False
        publisher.listen(self._on_policies)
        leases.listen(self._on_leases)

    async def follow(self, last: str | None) -> AsyncIterator[bytes]:
        """Events from now on, or from the one after `last`, which is the id of an event.

        An event `reset` says that there is no going on from the last one: the database was restored, or the client was
        away for longer than the change log reaches. What follows it begins with the present.
        """
        queue = _Queue()
        self._queues.add(queue)
        try:
            _, head = await self._ledger.head()
            place = (int(head), 1 << 31)
            if last is not None:
                known = await self._place(last)
                if known is None:
                    yield event("reset", {"revision": head})
                place = known or place
            history = self._histories
            while True:
                changed = self._changed
                if history != self._histories:
                    history = self._histories
                    _, head = await self._ledger.head()
                    place = (int(head), 1 << 31)
                    yield event("reset", {"revision": head})
                async for item, after in self._since(place):
                    place = after
                    yield item
                while queue.events:
                    yield queue.events.popleft()
                if queue.overrun:
                    return
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        await changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._queues.discard(queue)

    async def _place(self, last: str) -> tuple[int, int] | None:
        """Revision and index of the event with this id; None if it is not in the change log."""
        found = EventId.parse(last)
        if found is None or found.table != self._ledger.table:
            return None
        epoch, _ = await self._ledger.head()
        entries = await self._ledger.log_from(found.revision, limit=1)
        same = [entry for entry in entries if entry.revision == found.revision]
        return (found.revision, found.index) if same and change_hash(epoch, same[0]) == found.change else None

    async def _since(self, place: tuple[int, int]) -> AsyncIterator[tuple[bytes, tuple[int, int]]]:
        epoch, head = await self._ledger.head()
        revision = min(place[0], int(head) + 1)
        while entries := await self._ledger.log_from(Revision(revision), limit=PAGE):
            for entry in entries:
                for item in events_of(self._ledger.table, epoch, entry):
                    after = item.id.revision, item.id.index
                    if after > place:
                        yield _encode(item), after
            revision = entries[-1].revision + 1

    def _on_policies(self, mirrored: Mirrored) -> None:
        # The first reading is no news to a stream that began before it.
        self._histories += mirrored.reloaded and self._read
        self._read = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _on_leases(self, update: Update[Lease]) -> None:
        told: list[bytes] = []
        for key, lease in update.changes.items():
            before = self._known.pop(key, None)
            if lease is not None:
                self._known[key] = lease
                told.append(event("lease.acquired", {"data": lease.encode(), "revision": update.revision}))
            elif before is not None:
                told.append(event("lease.removed", {"data": before.encode(), "revision": update.revision}))
        for queue in self._queues:
            queue.add(told)
        self._wake()


class _Queue:
    """Lease events that one client has not taken yet."""

    def __init__(self) -> None:
        self.events: deque[bytes] = deque()
        self.overrun = False

    def add(self, events: Sequence[bytes]) -> None:
        self.events.extend(events)
        if len(self.events) > MAX_LEASE_EVENTS:
            self.overrun = True
            self.events.clear()


def _encode(item: Event) -> bytes:
    """An event in the structured form of CloudEvents, as JSON."""
    headers = item.headers(None)
    data: Mapping[str, Any] = {
        "specversion": "1.0",
        "id": str(item.id),
        "source": headers["ce-source"],
        "type": headers["ce-type"],
        "subject": "/".join(item.about),
        "time": headers["ce-time"],
        "revision": item.id.revision,
        "datacontenttype": "application/json",
        "data": dict(item.data),
    }
    return event(item.kind, data, number=str(item.id))
