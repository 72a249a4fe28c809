"""The policies as they are in SQL at this moment, kept in memory so that listing them does not mean reading them all.

Before each answer the database is asked for its latest revision, so a list has every change committed before it was
asked for, by whichever server. What changed since the last answer is read from the change log; the whole is read only
at first, after a long time, or when the database was restored (epoch, revision or request id are not where they were).
Questions that come while one is being asked share the next.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from databases.core import Connection
from prometheus_client import Gauge

from bus.ledger import Ledger, decode_logged
from bus.messages import AppId, Policy
from services.policy.history import ADDED, event_policy
from services.policy.store import Filter, select
from services.policy.wire import Wire

MAX_BEHIND = 500
"""Changes from which on it is less work to read the whole."""
_AT_ONCE = 1000
"""Policies, after which the event loop has its turn."""
_HEAD = (
    "SELECT h.epoch, h.revision, l.request_id FROM table_head h LEFT JOIN change_log l"
    " ON l.table_name = h.name AND l.revision = h.revision WHERE h.name = 'policies'"
)
_REQUEST = "SELECT request_id FROM change_log WHERE table_name = 'policies' AND revision = :revision"
_CHANGES = (
    "SELECT events FROM change_log WHERE table_name = 'policies' AND revision > :after AND revision <= :last"
    " ORDER BY revision"
)

POLICIES = Gauge("silkbus_policies", "Policies at the last list")


@dataclass(frozen=True, slots=True)
class _Mark:
    """Which state of the database ours is."""

    epoch: str
    revision: int
    request_id: str | None


@dataclass(slots=True)
class _State:
    """Policies by the order in which they were added, and by the apps at their ends."""

    numbers: dict[Policy, int]
    of_app: dict[AppId, set[Policy]]
    next_number: int = 0

    def apply(self, changes: Iterable[tuple[bool, Policy]]) -> None:
        for added, policy in changes:
            if not added:
                if self.numbers.pop(policy, None) is not None:
                    for app in {policy.source, policy.destination}:
                        self.of_app[app].discard(policy)
                        if not self.of_app[app]:
                            del self.of_app[app]
            elif policy not in self.numbers:
                self.numbers[policy] = self.next_number
                self.next_number += 1
                self.of_app[policy.source].add(policy)
                self.of_app[policy.destination].add(policy)


class Listing:
    """Lists of the policies in the database of this ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._mark: _Mark | None = None
        self._state = _State({}, defaultdict(set))
        self._refreshing = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None
        self._encoding = asyncio.Lock()
        self._encoded: dict[Wire, tuple[_Mark | None, bytes]] = {}

    async def refresh(self) -> str:
        """Have every change committed by now; a text that names this state. Raises what the database raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._refresh())
        await asyncio.shield(self._next)
        if (mark := self._mark) is None:
            return ""
        # A restored database comes to the same revision again, with other policies.
        request = blake2b((mark.request_id or "").encode(), digest_size=4).hexdigest()
        return f"{mark.epoch[:8]}-{mark.revision}-{request}"

    def find(self, wanted: Filter) -> list[Policy]:
        """The policies that match, as of the last `refresh`, in the order in which they were added."""
        given = (wanted.either, wanted.sources, wanted.destinations)
        apps = next((apps for apps in given if apps is not None), None)
        if apps is None:
            return list(self._state.numbers)
        near = {policy for app in apps for policy in self._state.of_app.get(AppId(app), ())}
        return sorted(filter(wanted.matches, near), key=self._state.numbers.__getitem__)

    async def encoded(self, wire: Wire) -> bytes:
        """All policies as this version writes them, as of the last `refresh` or later; made once for each state."""
        async with self._encoding:
            mark, text = self._encoded.get(wire, (None, b""))
            if mark is None or mark != self._mark:
                mark = self._mark
                text = await asyncio.to_thread(wire.encode, self.find(Filter()))
                self._encoded[wire] = mark, text
            return text

    async def _refresh(self) -> None:
        async with self._refreshing:
            self._next = None  # who comes from now on needs a reading that begins later
            await self._ledger.read(self._read)
            POLICIES.set(len(self._state.numbers))

    async def _read(self, database: Connection) -> None:
        mark = _mark(await database.fetch_one(_HEAD))
        if mark == self._mark:
            return
        if self._mark is not None and await self._leads_to(mark, database):
            between = {"after": self._mark.revision, "last": mark.revision}
            self._state.apply(await _changes(await database.fetch_all(_CHANGES, between)))
        else:
            state = _State({}, defaultdict(set))
            policies = await select(database, Filter())
            for start in range(0, len(policies), _AT_ONCE):
                state.apply((True, policy) for policy in policies[start : start + _AT_ONCE])
                await asyncio.sleep(0)
            self._state = state
        self._mark = mark

    async def _leads_to(self, mark: _Mark, database: Connection) -> bool:
        """Whether the log goes on from our state to `mark`, and is not too long."""
        ours = self._mark
        if ours is None or ours.epoch != mark.epoch or not 0 < mark.revision - ours.revision <= MAX_BEHIND:
            return False
        known: str | None = await database.fetch_val(_REQUEST, {"revision": ours.revision})
        return known is not None and known == ours.request_id


def _mark(row: Any) -> _Mark:
    if row is None:
        raise LookupError("table_head has no row 'policies': run the migrations first")
    return _Mark(row["epoch"], row["revision"], row["request_id"])


async def _changes(rows: Iterable[Any]) -> list[tuple[bool, Policy]]:
    """The policies added (True) and removed, in order."""
    changes: list[tuple[bool, Policy]] = []
    for row in rows:
        for event in decode_logged(row["events"]):
            changes.append((event["kind"] == ADDED, event_policy(event)))
            if len(changes) % _AT_ONCE == 0:
                await asyncio.sleep(0)
    return changes
