"""What a replica does with what it hears: decisions only, no I/O and no clock of its own.

The caller passes in messages, answers and the time (seconds that never go back and count while the machine sleeps:
CLOCK_BOOTTIME), looks at `ask_at`, and asks the centre when that time has come.

    change     the next revision: apply it; a later one: keep it, and ask if the gap is not filled soon
    heartbeat  our revision and digest: confirmed; another digest or epoch: take the whole table; a later revision: ask;
               a lower one three times running: the database was restored, take the whole table
    silence    of three heartbeats: ask
    answer     applied as a whole; live changes that came while a whole table loads wait for it; "busy": ask later

Within an epoch a replica goes back to a lower revision only while heartbeats keep saying that the database was
restored: one answer of a server that lags behind must not bring a revoked policy back.
"""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from prometheus_client import Counter

from bus.decode import Fields, Malformed
from bus.log import about
from bus.messages import Revision
from bus.tables.table import Changes, Content, Key, Table, Update, as_changes, unpack_changes
from bus.wire import unpack

log = logging.getLogger(__name__)

V = TypeVar("V")

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
START_SECONDS = 10.0
LOWER_HEARTBEATS = 3
GAP_SECONDS = 0.05
JITTER_SECONDS = 0.2
RETRY_SECONDS = (0.5, 10.0)
"""First and longest wait before asking again when nobody answered."""
MAX_WAITING = 10_000

RESYNCS = Counter("silkbus_table_resyncs_total", "Times a replica asked the centre", ["table", "reason"])
REFUSED_ENTRIES = Counter("silkbus_table_refused_entries_total", "Entries that could not be understood", ["table"])


class State(StrEnum):
    STARTING = "starting"
    """Nothing may be derived from the replica yet."""
    LIVE = "live"
    """The centre is heard, and confirms what the replica holds."""
    CACHED = "cached"
    """The centre is silent; the replica holds what it last said, not too long ago."""
    DEGRADED = "degraded"
    """The centre is silent, and what it last said is unknown or too old: the replica is empty."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What to ask the centre: the changes since a revision of an epoch; -1 for the whole table."""

    epoch: str
    since: int


class Follower(Generic[V]):
    """A replica of `table` that starts from `content`, confirmed by the centre `age` seconds ago (None: never)."""

    def __init__(
        self,
        table: Table[V],
        emit: Callable[[Update[V]], None],
        *,
        now: float,
        max_stale: float,
        patience: float = START_SECONDS,
        content: Content | None = None,
        age: float | None = None,
    ) -> None:
        self.table = table
        self.state = State.STARTING
        self.entries: dict[Key, V] = {}
        self.content = Content()
        self.ask_at: float | None = now
        self.confirmed_at = now - age if age is not None else None
        self._emit = emit
        self._max_stale = max_stale
        self._patience = patience
        self._started_at = now
        self._heard_at = now
        self._whole = False
        self._loading_whole = False
        self._failures = 0
        self._lower = 0
        self._unfilled = 0
        self._waiting: dict[int, tuple[str, Changes]] = {}
        if content is not None and not self._stale(now):
            self._become(content)

    @property
    def revision(self) -> Revision:
        return self.content.revision

    def on_change(self, message: Fields, now: float) -> None:
        """A change published live. Raises Malformed."""
        epoch, revision = message.text("epoch"), message.integer("revision", low=1)
        self._heard(now)
        if revision <= self.revision and epoch == self.content.epoch:
            return
        if "changes" not in message:
            self._want("large", now)
            return
        self._waiting[revision] = (epoch, as_changes(message.items("changes")))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.clear()
            self._want("overrun", now, whole=True)
        elif not self._loading_whole:
            self._take_waiting(now)

    def on_heartbeat(self, message: Fields, now: float) -> None:
        """A server's position. Raises Malformed."""
        epoch, revision = message.text("epoch"), message.integer("revision")
        digest = message.data("digest")
        self._heard(now)
        if epoch != self.content.epoch:
            self._want("epoch", now, whole=bool(self.content.epoch))
        elif revision > self.revision:
            self._want("behind", now, GAP_SECONDS)
        elif revision < self.revision:
            self._lower += 1
            if self._lower >= LOWER_HEARTBEATS:
                self._want("restored", now, whole=True)
            return
        elif digest != self.content.digest:
            self._want("digest", now, whole=True)
        else:
            self._confirm(now)
        self._lower = 0

    def on_connect(self, now: float) -> None:
        """The bus is there (again): what was said meanwhile was missed."""
        self._failures = 0
        self.ask_at = None  # who has waited for the bus need wait no longer
        self._want("connected", now, 0 if self.state is State.STARTING else JITTER_SECONDS)

    def tick(self, now: float) -> None:
        """What follows from time alone. Call it whenever `ask_at` or a second has passed."""
        silent = now - self._heard_at > SILENCE_SECONDS
        if silent:
            self._want("silence", now)
            if self.state is State.LIVE:
                self.state = State.CACHED
                log.warning("the centre is silent, going on with what it last said", extra=self._about())
        if self.state is State.STARTING and now - self._started_at >= self._patience:
            self.state = State.CACHED if self.content.epoch else State.DEGRADED
            log.warning("the centre does not answer, starting without it", extra=self._about(state=self.state))
        if self.state is not State.DEGRADED and self.content.epoch and self._stale(now):
            log.error("what the centre last said is too old, dropping it", extra=self._about())
            self._become(Content())
            if self.state is not State.STARTING:
                self.state = State.DEGRADED

    def begin_ask(self) -> Ask:
        """What to ask now. `on_answer` or `on_no_answer` must follow."""
        self.ask_at = None
        self._loading_whole = self._whole or not self.content.epoch
        self._whole = False
        return Ask(self.content.epoch, -1 if self._loading_whole else self.revision)

    def on_no_answer(self, now: float) -> None:
        self._whole = self._whole or self._loading_whole
        self._loading_whole = False
        first, longest = RETRY_SECONDS
        wait = min(longest, first * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
        self._take_waiting(now)
        self.ask_at = now + wait * random.uniform(0.5, 1)  # noqa: S311 (spreads load, keeps no secret)

    def on_answer(self, head: Fields, data: bytes, now: float) -> None:
        """A complete answer: the head of its parts, and their data uncompressed. Raises Malformed.

        `age` in the head is how many seconds ago the server last found its own state equal to the database's.
        """
        kind, epoch = head.text("kind"), head.text("epoch")
        self._heard(now)
        if kind == "busy":
            self.on_no_answer(now)
            return
        self._loading_whole = False
        self._failures = 0
        revision, digest = Revision(head.integer("revision")), head.data("digest")
        seen_at = now - (max(0.0, head.number("age")) if "age" in head else 0.0)
        if now - seen_at > self._max_stale:
            return  # as from a cache that is too old
        if kind == "snapshot":
            self._on_snapshot(epoch, revision, digest, data, seen_at, now)
        elif kind in ("changes", "current"):
            if epoch != self.content.epoch:
                self._want("epoch", now, whole=True)
            elif revision >= self.revision:
                if kind == "changes" and revision > self.revision:
                    self._apply(revision, unpack_changes(data, "changes"))
                if digest != self.content.digest:
                    self._want("digest", now, whole=True)
                else:
                    self._confirm(now, seen_at)
        else:
            raise head.malformed("kind", f"unknown: {kind!r}")
        self._take_waiting(now, answered=True)

    def _on_snapshot(
        self, epoch: str, revision: Revision, digest: bytes, data: bytes, seen_at: float, now: float
    ) -> None:
        restored = self._lower >= LOWER_HEARTBEATS
        if epoch == self.content.epoch and revision < self.revision and not restored:
            return  # live changes have overtaken it, or its server lags behind
        entries = dict(unpack_changes(data, "snapshot"))
        content = Content.of(epoch, revision, {key: value for key, value in entries.items() if value is not None})
        if content.digest != digest:
            raise Malformed(f"snapshot of {self.table.name} at {revision}: the digest does not fit the entries")
        self._become(content)
        self._lower = 0
        self._confirm(now, seen_at)

    def _take_waiting(self, now: float, *, answered: bool = False) -> None:
        """Apply the kept changes that now follow; ask, a little later, if some are left.

        `answered`: a server has just said all it knows. It may lag by a heartbeat; what still does not follow then is
        of a history that is no more, and asking for what is before it would go on for ever.
        """
        here = self.content.epoch
        while (following := self._waiting.get(self.revision + 1)) is not None and following[0] == here:
            self._apply(Revision(self.revision + 1), following[1])
            self._confirm(now)
        self._waiting = {r: kept for r, kept in self._waiting.items() if r > self.revision or kept[0] != here}
        self._unfilled = self._unfilled + answered if self._waiting else 0
        if self._unfilled > 1:
            self._waiting.clear()
        elif self._waiting:
            self._want("gap", now, HEARTBEAT_SECONDS if answered else GAP_SECONDS)

    def _become(self, content: Content) -> None:
        """Take this content; listeners get the difference."""
        changes = self.content.difference(content)
        self.content = content
        self._tell(content.revision, changes)

    def _apply(self, revision: Revision, changes: Changes) -> None:
        self.content.apply(revision, changes)
        self._tell(revision, changes)

    def _tell(self, revision: Revision, changes: Changes) -> None:
        typed: dict[Key, V | None] = {}
        for key, data in changes:
            value = None if data is None else self._decode(key, data)
            if value is not None:
                self.entries[key] = value
                typed[key] = value
            elif self.entries.pop(key, None) is not None:
                typed[key] = None
        self._emit(Update(revision, typed))

    def _decode(self, key: Key, data: bytes) -> V | None:
        try:
            return self.table.decode(key, unpack(data, self.table.name))
        except Malformed as error:
            # As if it were not there: for a policy that means denied. The others are not affected.
            REFUSED_ENTRIES.labels(self.table.name).inc()
            log.error("entry refused", extra=self._about(key=list(key), error=str(error)))
            return None

    def _confirm(self, now: float, seen_at: float | None = None) -> None:
        """What the replica holds was what the database holds at `seen_at`, or is now."""
        seen_at = now if seen_at is None else seen_at
        self.confirmed_at = seen_at if self.confirmed_at is None else max(self.confirmed_at, seen_at)
        if self.state is not State.LIVE and now - seen_at <= SILENCE_SECONDS:
            log.info("in sync with the centre", extra=self._about())
            self.state = State.LIVE

    def _heard(self, now: float) -> None:
        if now - self._heard_at > SILENCE_SECONDS and self.ask_at is not None:
            # The centre is back: who waits long before asking again, since nobody answered, need not.
            self._failures = 0
            self.ask_at = min(self.ask_at, now + random.uniform(0, JITTER_SECONDS))  # noqa: S311 (as below)
        self._heard_at = now

    def _stale(self, now: float) -> bool:
        return self.confirmed_at is None or now - self.confirmed_at > self._max_stale

    def _want(self, reason: str, now: float, delay: float = 0.0, *, whole: bool = False) -> None:
        """Ask soon, unless that is already arranged."""
        if self._loading_whole:
            return  # what comes is compared with the next heartbeat anyway
        if whole and not self._whole:
            self._waiting.clear()
        self._whole = self._whole or whole
        if self.ask_at is not None:
            return
        RESYNCS.labels(self.table.name, reason).inc()
        log.info("asking the centre", extra=self._about(reason=reason))
        self.ask_at = now + delay + random.uniform(0, JITTER_SECONDS if delay else 0)  # noqa: S311 (as above)

    def _about(self, **fields: Any) -> dict[str, Any]:
        return about(table=self.table.name, revision=self.revision, **fields)
