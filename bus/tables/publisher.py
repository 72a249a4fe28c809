"""Sends what SQL committed: changes at once, heartbeats each second, and the whole table to those who ask.

Each server that writes a table has a publisher; none leads. A publisher keeps a mirror of the table, fed with its own
commits and with the change log, which it looks at once a second. So what another server committed and never sent, since
it was killed, is in this one's heartbeat, and replicas ask for it. A database restored from a dump is noticed by the
request ids of the revisions last read and last applied, which are then others or missing.

Publishing does not wait for SQL: what was committed is sent while the database hangs. What is vouched for does: there
is no heartbeat without a look at the change log, and an answer says how long ago the last one was.
"""

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from prometheus_client import Counter, Gauge

from bus import subjects
from bus.connection import Connection
from bus.decode import Fields
from bus.log import about
from bus.messages import Revision
from bus.tables.table import Changes, Content, Key, Table
from bus.wire import encode, pack

if TYPE_CHECKING:  # bus.ledger itself uses bus.tables.table, in this package; and no cell needs a database
    from databases.core import Connection as DatabaseConnection

    from bus.ledger import Ledger, Outcome

log = logging.getLogger(__name__)

V = TypeVar("V")
Entries = Callable[["DatabaseConnection"], Awaitable[Mapping[Key, Any]]]

HEARTBEAT_SECONDS = 1.0
RECHECK_SECONDS = 600.0
DATABASE_SECONDS = 30.0
"""How long a look at the database may take: more than to read a whole table."""
PAGE = 1000
KEPT_REVISIONS = 20_000
KEPT_ENTRIES = 200_000
MAX_SNAPSHOT_CHANGES = 2_000
"""How many later changes are sent along with a snapshot before a new one is made, which takes a fifth of a second."""
MAX_BACKLOG_BYTES = 8 << 20
"""A snapshot is sent when less than this waits to be sent, so that changes and heartbeats are not stuck behind many."""
MAX_WAITING = 200
TURN_SECONDS = 3.0
"""How many requests may wait how long for their turn. They are told at once, or then, to come back later: the replica's
patience (bus.tables.replica.ANSWER_TIMEOUT) is longer, so no answer is sent to one who has given up."""
HEADROOM = 4096
"""Bytes of a message that are not table data."""
COMPRESSION = 1
"""zlib's fastest: table data shrinks five-fold, and a snapshot of 60 000 policies is ready in 0.1 s."""

PUBLISHED = Counter("silkbus_table_published_total", "Changes published", ["table"])
ANSWERED = Counter("silkbus_table_answered_total", "Fetches answered", ["table", "kind"])
REVISION = Gauge("silkbus_table_revision", "Revision of the table in the database", ["table"])


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What became of a publisher's mirror: the changes that brought it to `revision`.

    `digest` is equal on all servers with the same entries; `changed_at_ms` is the latest Unix time at which any change
    up to this revision was written down. `reloaded`: the changes are the difference to what the database holds, which
    may be another history.
    """

    epoch: str
    revision: Revision
    digest: bytes
    changes: Changes
    changed_at_ms: int
    reloaded: bool = False


class Publisher(Generic[V]):
    """Publishes one table. `entries` reads all its entries from SQL, as key -> value before packing."""

    def __init__(self, connection: Connection, ledger: "Ledger", table: Table[V], entries: Entries) -> None:
        self.connection = connection
        self.ledger = ledger
        self.table = table
        self.entries = entries
        self._mirror: Content | None = None
        self._last_request = ""
        self._read = Revision(0), ""
        """The last revision that was read from the change log, and its request id."""
        self._seen_at = 0.0
        """When the mirror was last found equal to the database."""
        self._checked_at = 0.0
        self._kept: deque[tuple[Revision, Changes]] = deque()
        self._kept_entries = 0
        self._outgoing: deque[Outcome[Any]] = deque()
        self._wake = asyncio.Event()
        self._trouble = ""
        self._snapshot: tuple[Revision, bytes] | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._changed_at_ms = 0
        self._listeners: list[Callable[[Mirrored], None]] = []

    def listen(self, listener: Callable[[Mirrored], None]) -> None:
        """Have all of the mirror, as one change, when it is first read, and each change from then on.

        Listeners are called in the event loop, before the bus and the asking cells know of a change; they must not
        block, nor raise.
        """
        self._listeners.append(listener)

    @property
    def age(self) -> float:
        """Seconds since the mirror was last found equal to the database; very many before it ever was."""
        return time.monotonic() - self._seen_at

    @property
    def epoch(self) -> str:
        """The database's epoch, empty before it was read."""
        return "" if self._mirror is None else self._mirror.epoch

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
        """Publish for ever. A database that is slow or away stops the heartbeats, not the changes."""
        subject = subjects.table_fetch(self.table.name)
        await self.connection.serve_parts(subject, self._on_fetch, queue="publishers")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publish_committed())
            tasks.create_task(self._heartbeat())

    async def _publish_committed(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outgoing:
                await self._publish(self._outgoing.popleft())

    async def _publish(self, outcome: "Outcome[Any]") -> None:
        if self._mirror is None:
            return  # the first heartbeat, about to come, speaks of it
        message: dict[str, Any] = {
            "epoch": self._mirror.epoch,
            "previous": outcome.revision - 1,
            "revision": outcome.revision,
        }
        whole = encode({**message, "changes": [[list(key), data] for key, data in outcome.changes]})
        # What is too large for one message goes as its header alone; replicas then fetch.
        fits = len(whole) <= self.connection.max_payload
        data = whole if fits else encode(message)
        if outcome.revision == self._mirror.revision + 1:
            self._apply(outcome.revision, outcome.request_id, outcome.changes, outcome.changed_at_ms)
        if await self.connection.publish_bytes(subjects.table_change(self.table.name), data):
            PUBLISHED.labels(self.table.name).inc()

    async def _heartbeat(self) -> None:
        while True:
            begun = time.monotonic()
            if await self._vouch() and self._mirror is not None:
                REVISION.labels(self.table.name).set(self._mirror.revision)
                message = self._position(self._mirror)
                await self.connection.publish(subjects.table_heartbeat(self.table.name), message)
            await asyncio.sleep(max(0.0, begun + HEARTBEAT_SECONDS - time.monotonic()))

    async def _vouch(self) -> bool:
        """Whether the mirror could be made equal to the database, in time."""
        # In a task of its own: one that hangs can be left behind, and `databases` keeps connections, also broken ones,
        # by task.
        task = asyncio.create_task(self._catch_up())
        try:
            await asyncio.wait({task}, timeout=DATABASE_SECONDS)
        finally:
            task.cancel()
        if not task.done():
            error = f"no answer within {DATABASE_SECONDS:g} s"
        else:
            error = repr(task.exception()) if task.exception() else ""
        if error != self._trouble:
            self._trouble = error
            fields = about(table=self.table.name, error=error)
            if error:
                log.error("cannot read the table: no heartbeats until the database answers", extra=fields)
            else:
                log.info("the database answers again", extra=fields)
        return not error

    async def _catch_up(self) -> None:
        """Make the mirror equal to the database."""
        begun = time.monotonic()
        if self._mirror is None or begun - self._checked_at > RECHECK_SECONDS:
            await self._reload()
        if not await self._read_log():
            log.warning("the database holds another history, reading it anew", extra=about(table=self.table.name))
            await self._reload()
        self._seen_at = begun

    async def _read_log(self) -> bool:
        """Apply all that was committed since the last look; whether it follows on what the mirror holds."""
        mirror = self._mirror
        assert mirror is not None  # noqa: S101 (for the type checker: _reload sets it)
        known = mirror.revision
        epoch, head = await self.ledger.head()
        if epoch != mirror.epoch or head < known:
            return False
        while True:
            revision, request_id = self._read
            log_entries = await self.ledger.log_from(revision, limit=PAGE)
            if request_id and not (log_entries and log_entries[0].request_id == request_id):
                return False
            for entry in log_entries:
                if entry.revision == mirror.revision + 1:
                    self._apply(entry.revision, entry.request_id, entry.changes, entry.changed_at_ms)
                elif entry.revision == mirror.revision and entry.request_id != self._last_request:
                    return False
                self._read = entry.revision, entry.request_id
            if len(log_entries) < PAGE:
                return mirror.revision >= head

    async def _reload(self) -> None:
        content, last = await self.ledger.content(self.entries)
        start = Revision(max(1, content.revision - PAGE + 1))
        recent = await self.ledger.log_from(start, limit=PAGE)
        changed_at_ms = await self.ledger.last_changed()
        old = self._mirror
        if old is not None and (old.epoch, old.revision) == (content.epoch, content.revision):
            if (old.digest, self._last_request) == (content.digest, last):
                self._read, self._checked_at = (content.revision, last), time.monotonic()
                return  # and what is kept of its past stays of use
            log.error("the mirror differed from the database", extra=about(table=self.table.name))
        self._mirror, self._last_request = content, last
        self._read = content.revision, last
        self._checked_at = time.monotonic()
        self._kept.clear()
        self._kept_entries = 0
        self._snapshot = None
        for entry in recent:
            if entry.revision <= content.revision:
                self._keep(entry.revision, entry.changes)
        self._changed_at_ms = changed_at_ms
        self._tell((old or Content()).difference(content), reloaded=True)

    def _apply(self, revision: Revision, request_id: str, changes: Changes, changed_at_ms: int) -> None:
        assert self._mirror is not None  # noqa: S101 (for the type checker: callers hold one)
        self._mirror.apply(revision, changes)
        self._last_request = request_id
        self._keep(revision, changes)
        self._changed_at_ms = max(self._changed_at_ms, changed_at_ms)
        self._tell(changes)

    def _tell(self, changes: Changes, *, reloaded: bool = False) -> None:
        assert self._mirror is not None  # noqa: S101 (as above)
        mirror = self._mirror
        what = Mirrored(mirror.epoch, mirror.revision, mirror.digest, changes, self._changed_at_ms, reloaded)
        for listener in self._listeners:
            listener(what)

    def _keep(self, revision: Revision, changes: Changes) -> None:
        """Keep a revision for those who ask for what came after an earlier one, as long as there is room."""
        self._kept.append((revision, changes))
        self._kept_entries += len(changes)
        while self._kept and (len(self._kept) > KEPT_REVISIONS or self._kept_entries > KEPT_ENTRIES):
            self._kept_entries -= len(self._kept.popleft()[1])

    def _position(self, mirror: Content) -> dict[str, Any]:
        return {"epoch": mirror.epoch, "revision": mirror.revision, "digest": mirror.digest}

    async def _on_fetch(self, _: str, request: Fields) -> Sequence[Mapping[str, Any]]:
        epoch, since = request.optional_text("epoch") or "", request.integer("since", low=-1)
        if self._mirror is None:
            return []  # another server may know more, and the replica asks again
        changes = self._changes_since(since) if epoch == self._mirror.epoch else None
        if changes is not None:
            kind, body = ("changes", compress(changes)) if changes else ("current", b"")
        elif await self._may_send():
            kind, body = "snapshot", self._whole()
        else:
            kind, body = "busy", b""
        ANSWERED.labels(self.table.name, kind).inc()
        size = max(1, self.connection.max_payload - HEADROOM)
        pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        # All parts are of one server at one revision: the position is taken before the first is sent.
        age = self.age
        head = {"kind": kind, **self._position(self._mirror), "age": age, "parts": len(pieces)}
        return [{**head, "part": number, "data": piece} for number, piece in enumerate(pieces)]

    def _changes_since(self, since: int) -> Changes | None:
        """What brings a replica at `since` to the mirror, or None if that is not kept."""
        assert self._mirror is not None  # noqa: S101 (for the type checker: callers hold one)
        if not 0 <= since <= self._mirror.revision:
            return None
        if since < self._mirror.revision and not (self._kept and self._kept[0][0] <= since + 1):
            return None
        merged: dict[Key, bytes | None] = {}
        for revision, changes in reversed(self._kept):
            if revision <= since:
                break
            for key, data in changes:
                merged.setdefault(key, data)  # the latest is met first
        return tuple(merged.items())

    def _whole(self) -> bytes:
        """All of the mirror, compressed: a snapshot, and what changed since it was made."""
        assert self._mirror is not None  # noqa: S101 (as above)
        if self._snapshot is not None:
            made_at, body = self._snapshot
            changes = self._changes_since(made_at)
            if changes is not None and len(changes) <= MAX_SNAPSHOT_CHANGES:
                return body + compress(changes) if changes else body
        self._snapshot = self._mirror.revision, compress(tuple(self._mirror.entries.items()))
        return self._snapshot[1]

    async def _may_send(self) -> bool:
        """Wait, in turn, until little is waiting to be sent; False when that takes too long."""
        if self._waiting >= MAX_WAITING:
            return False
        self._waiting += 1
        try:
            async with asyncio.timeout(TURN_SECONDS), self._turn:
                while self.connection.backlog > MAX_BACKLOG_BYTES:  # noqa: ASYNC110 (nats-py tells nobody)
                    await asyncio.sleep(0.005)
            return True
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1


def compress(changes: Changes) -> bytes:
    return zlib.compress(pack([[list(key), data] for key, data in changes]), COMPRESSION)
