"""Sends what SQL committed: changes at once, heartbeats each second, and the whole table to those who ask.

Each server that writes a table has a publisher; none leads. A publisher keeps a mirror of the table, fed with its own
commits and with the change log, which it looks at once a second. So what another server committed and never sent, since
it was killed, is in this one's heartbeat, and replicas ask for it. A database restored from a dump is noticed by the
request id of the mirror's revision, which is then another or missing.
"""

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from databases.core import Connection as DatabaseConnection
from prometheus_client import Counter, Gauge

from bus import subjects
from bus.connection import Connection
from bus.decode import Fields
from bus.log import about
from bus.messages import Revision
from bus.tables.table import Changes, Content, Key, Table
from bus.wire import encode, pack

if TYPE_CHECKING:  # bus.ledger itself uses bus.tables.table, in this package
    from bus.ledger import Ledger, Outcome

log = logging.getLogger(__name__)

V = TypeVar("V")
Entries = Callable[[DatabaseConnection], Awaitable[Mapping[Key, Any]]]

HEARTBEAT_SECONDS = 1.0
RECHECK_SECONDS = 600.0
KEPT_REVISIONS = 20_000
HEADROOM = 4096
"""Bytes of a message that are not table data."""
COMPRESSION = 1
"""zlib's fastest: table data shrinks five-fold, and a snapshot of 60 000 policies is ready in 0.1 s."""

PUBLISHED = Counter("silkbus_table_published_total", "Changes published", ["table"])
ANSWERED = Counter("silkbus_table_answered_total", "Fetches answered", ["table", "kind"])
REVISION = Gauge("silkbus_table_revision", "Revision of the table in the database", ["table"])


class Publisher(Generic[V]):
    """Publishes one table. `entries` reads all its entries from SQL, as key -> value before packing."""

    def __init__(self, connection: Connection, ledger: "Ledger", table: Table[V], entries: Entries) -> None:
        self.connection = connection
        self.ledger = ledger
        self.table = table
        self.entries = entries
        self._mirror: Content | None = None
        self._last_request = ""
        self._kept: deque[tuple[Revision, Changes]] = deque(maxlen=KEPT_REVISIONS)
        self._outgoing: deque[Outcome[Any]] = deque()
        self._wake = asyncio.Event()
        self._snapshot: tuple[Revision, bytes] | None = None
        self._checked_at = 0.0

    @property
    def revision(self) -> Revision | None:
        """The revision this publisher knows, or None before it has read the database."""
        return None if self._mirror is None else self._mirror.revision

    def committed(self, outcome: "Outcome[Any]") -> None:
        """Publish a change that was just committed. Returns at once, whatever the bus does."""
        if outcome.changed:
            self._outgoing.append(outcome)
            self._wake.set()

    async def run(self) -> None:
        """Publish for ever."""
        subject = subjects.table_fetch(self.table.name)
        await self.connection.serve_parts(subject, self._on_fetch, queue="publishers")
        next_heartbeat = 0.0
        while True:
            self._wake.clear()
            while self._outgoing:
                await self._publish(self._outgoing.popleft())
            now = time.monotonic()
            if now >= next_heartbeat:
                next_heartbeat = now + HEARTBEAT_SECONDS
                await self._heartbeat()
            try:
                async with asyncio.timeout(max(0.0, next_heartbeat - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _publish(self, outcome: "Outcome[Any]") -> None:
        message: dict[str, Any] = {
            "epoch": self._mirror.epoch if self._mirror else (await self.ledger.head())[0],
            "previous": outcome.revision - 1,
            "revision": outcome.revision,
        }
        whole = encode({**message, "changes": [[list(key), data] for key, data in outcome.changes]})
        # What is too large for one message goes as its header alone; replicas then fetch.
        fits = len(whole) <= self.connection.max_payload
        data = whole if fits else encode(message)
        if await self.connection.publish_bytes(subjects.table_change(self.table.name), data):
            PUBLISHED.labels(self.table.name).inc()
        if self._mirror is not None and outcome.revision == self._mirror.revision + 1:
            self._apply(outcome.revision, outcome.request_id, outcome.changes)

    async def _heartbeat(self) -> None:
        try:
            await self._catch_up()
        except Exception as error:  # the database may fail in any way; without it there is nothing to vouch for
            log.exception(
                "cannot read the table, no heartbeat sent", extra=about(table=self.table.name, error=repr(error))
            )
            return
        if self._mirror is not None:
            REVISION.labels(self.table.name).set(self._mirror.revision)
            message = self._position(self._mirror)
            await self.connection.publish(subjects.table_heartbeat(self.table.name), message)

    async def _catch_up(self) -> None:
        """Make the mirror equal to the database."""
        if self._mirror is None or time.monotonic() - self._checked_at > RECHECK_SECONDS:
            await self._reload()
        mirror = self._mirror
        assert mirror is not None  # noqa: S101 (for the type checker: _reload sets it)
        epoch, revision = await self.ledger.head()
        if (epoch, revision) == (mirror.epoch, mirror.revision) and revision == 0:
            return
        log_entries = await self.ledger.log_from(mirror.revision)
        known = log_entries[0].request_id if log_entries and log_entries[0].revision == mirror.revision else ""
        if epoch != mirror.epoch or known != self._last_request:
            log.warning("the database holds another history, reading it anew", extra=about(table=self.table.name))
            await self._reload()
            return
        for entry in log_entries:
            if entry.revision == mirror.revision + 1:
                self._apply(entry.revision, entry.request_id, entry.changes)

    async def _reload(self) -> None:
        content, last = await self.ledger.content(self.entries)
        old = self._mirror
        same = old is not None and (old.epoch, old.revision) == (content.epoch, content.revision)
        if old is not None and same and old.digest != content.digest:
            log.error("the mirror differed from the database", extra=about(table=self.table.name))
        self._mirror, self._last_request = content, last
        self._checked_at = time.monotonic()
        self._kept.clear()
        self._snapshot = None

    def _apply(self, revision: Revision, request_id: str, changes: Changes) -> None:
        assert self._mirror is not None  # noqa: S101 (for the type checker: callers hold one)
        self._mirror.apply(revision, changes)
        self._last_request = request_id
        self._kept.append((revision, changes))
        self._snapshot = None

    def _position(self, mirror: Content) -> dict[str, Any]:
        return {"epoch": mirror.epoch, "revision": mirror.revision, "digest": mirror.digest}

    async def _on_fetch(self, _: str, request: Fields) -> Sequence[Mapping[str, Any]]:
        epoch, since = request.optional_text("epoch") or "", request.integer("since", low=-1)
        if self._mirror is None:
            return []  # another server may know more, and the replica asks again
        kind, body = self._answer(self._mirror, epoch, since)
        ANSWERED.labels(self.table.name, kind).inc()
        size = max(1, self.connection.max_payload - HEADROOM)
        pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        # All parts are of one server at one revision: the position is taken before the first is sent.
        head = {"kind": kind, **self._position(self._mirror), "parts": len(pieces)}
        return [{**head, "part": number, "data": piece} for number, piece in enumerate(pieces)]

    def _answer(self, mirror: Content, epoch: str, since: int) -> tuple[str, bytes]:
        """What brings a replica at `since` of `epoch` to the mirror: its kind, and the compressed changes."""
        if epoch == mirror.epoch and 0 <= since <= mirror.revision:
            if since == mirror.revision:
                return "current", b""
            if self._kept and self._kept[0][0] <= since + 1:
                merged: dict[Key, bytes | None] = {}
                for revision, changes in self._kept:
                    if revision > since:
                        merged.update(changes)
                return "changes", compress(tuple(merged.items()))
        if self._snapshot is None or self._snapshot[0] != mirror.revision:
            self._snapshot = mirror.revision, compress(tuple(mirror.entries.items()))
        return "snapshot", self._snapshot[1]


def compress(changes: Changes) -> bytes:
    return zlib.compress(pack([[list(key), data] for key, data in changes]), COMPRESSION)
