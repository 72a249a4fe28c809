"""Whatever the bus drops, repeats, reorders or delays, once it is quiet every replica equals SQL.

The machine plays a database with its history, two servers that publish what they committed and heartbeat what they
see, a bus that delivers when and as often as it likes, and replicas that restart from what they had on disk. The oracle
is the database's content.
"""

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.decode import Fields, Malformed
from bus.messages import Revision
from bus.tables.follower import Follower, State
from bus.tables.publisher import compress
from bus.tables.replica import decompress
from bus.tables.table import Changes, Content, Key, Table, Update
from bus.wire import decode, encode, pack

MAX_STALE = 3600.0


def _decode(key: Key, value: object) -> int:
    if isinstance(value, int):
        return value
    raise Malformed(f"{key}: not an integer")


TABLE: Table[int] = Table("numbers", _decode)
KEYS = st.sampled_from(["a", "b", "c", "d"])
VALUES = st.one_of(st.none(), st.integers(0, 3), st.just("not understood"))


def changes_of(entries: dict[str, int | str | None]) -> Changes:
    return tuple(((key,), None if value is None else pack(value)) for key, value in entries.items())


def message(**fields: object) -> Fields:
    """As it arrives: through the wire, with a field that only a newer minor version knows."""
    return decode(encode({**fields, "unknown": 1}), "message")


def on_the_wire(changes: Changes) -> list[object]:
    return [[list(key), data] for key, data in changes]


@dataclass
class Sql:
    """The truth: an epoch, and the changes since it began."""

    epoch: str = "e0"
    history: list[Changes] = field(default_factory=list)

    def content(self, upto: int | None = None) -> Content:
        content = Content(self.epoch)
        for number, changes in enumerate(self.history[:upto], 1):
            content.apply(Revision(number), changes)
        return content


class Cell:
    """A replica with its disk, and what its listeners were told."""

    def __init__(self, now: float) -> None:
        self.disk: tuple[Content, float] | None = None
        self.start(now)

    def start(self, now: float) -> None:
        content, age = None, None
        if self.disk is not None:
            content, age = self.disk[0], now - self.disk[1]
        self.told: dict[Key, int] = {}
        self.follower = Follower(TABLE, self.on_update, now=now, max_stale=MAX_STALE, content=content, age=age)
        self.follower.entries  # noqa: B018 (as a listener that looks at once)

    def on_update(self, update: Update[int]) -> None:
        for key, value in update.changes.items():
            if value is None:
                assert key in self.told, "told that something is gone that it was never told of"
                del self.told[key]
            else:
                self.told[key] = value

    def save(self) -> None:
        if self.follower.confirmed_at is not None and self.follower.content.epoch:
            content = self.follower.content
            copy = Content.of(content.epoch, content.revision, content.entries)
            self.disk = copy, self.follower.confirmed_at


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now = 1000.0
        self.sql = Sql()
        self.dump: Sql | None = None
        self.epochs = 0
        self.wire: list[tuple[str, Fields]] = []
        self.cells = [Cell(self.now) for _ in range(2)]

    # The centre.

    @rule(
        entries=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), fate=st.sampled_from(["sent", "large", "died"])
    )
    def commit(self, entries: dict[str, int | str | None], fate: str) -> None:
        changes = changes_of(entries)
        self.sql.history.append(changes)
        revision = len(self.sql.history)
        fields: dict[str, object] = {"epoch": self.sql.epoch, "previous": revision - 1, "revision": revision}
        if fate == "sent":
            fields["changes"] = on_the_wire(changes)
        if fate != "died":
            self.wire.append(("change", message(**fields)))

    @rule()
    def heartbeat(self) -> None:
        content = self.sql.content()
        position = {"epoch": content.epoch, "revision": content.revision, "digest": content.digest}
        self.wire.append(("heartbeat", message(**position)))

    @rule()
    def take_dump(self) -> None:
        self.dump = Sql(self.sql.epoch, list(self.sql.history))

    @precondition(lambda self: self.dump is not None)
    @rule()
    def restore_dump(self) -> None:
        """The database goes back; what was sent of the history that is no more may still arrive."""
        assert self.dump is not None
        self.sql = Sql(self.dump.epoch, list(self.dump.history))

    @precondition(lambda self: self.sql.history)
    @rule(entries=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), further=st.booleans())
    def rewrite_history(self, entries: dict[str, int | str | None], further: bool) -> None:
        """Restored to just before the last change, then written on: the same revision means something else."""
        self.sql.history[-1] = changes_of(entries)
        if further:
            self.sql.history.append(changes_of(entries))

    @precondition(lambda self: not self.epochs)
    @rule()
    def new_database(self) -> None:
        self.epochs += 1
        self.sql = Sql(f"e{self.epochs}")

    # The bus.

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        """Any message, to any cell; kept, it may come again."""
        at = data.draw(st.integers(0, len(self.wire) - 1))
        cell = data.draw(st.sampled_from(self.cells))
        kind, fields = self.wire[at] if keep else self.wire.pop(at)
        self.give(cell, kind, fields)

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))

    def give(self, cell: Cell, kind: str, fields: Fields) -> None:
        if kind == "change":
            cell.follower.on_change(fields, self.now)
        else:
            cell.follower.on_heartbeat(fields, self.now)

    # The cells.

    @rule(cell=st.integers(0, 1))
    def sync(self, cell: int) -> None:
        """Nothing goes wrong for a while: so that what goes wrong later hits a replica that is up to date."""
        follower = self.cells[cell].follower
        asked = follower.begin_ask()
        follower.on_answer(*self.answer(asked.epoch, asked.since), self.now)

    @rule(cell=st.integers(0, 1), meanwhile=st.integers(0, 2), fate=st.sampled_from(["answered", "silent", "stale"]))
    def ask(self, cell: int, meanwhile: int, fate: str) -> None:
        """A question and its answer, with live messages in between; a stale answer is a lagging server's."""
        follower = self.cells[cell].follower
        if follower.ask_at is None:
            return
        asked = follower.begin_ask()
        upto = max(0, len(self.sql.history) - 1) if fate == "stale" else None
        answer = self.answer(asked.epoch, asked.since, upto)
        for kind, fields in self.wire[-meanwhile:] if meanwhile else []:
            self.give(self.cells[cell], kind, fields)
        if fate == "silent":
            follower.on_no_answer(self.now)
        else:
            follower.on_answer(*answer, self.now)

    def answer(self, epoch: str, since: int, upto: int | None = None) -> tuple[Fields, bytes]:
        content = self.sql.content(upto)
        position = {"epoch": content.epoch, "revision": content.revision, "digest": content.digest}
        if epoch == content.epoch and 0 <= since <= content.revision:
            if since == content.revision:
                return message(kind="current", **position), b""
            merged = {key: data for changes in self.sql.history[since : content.revision] for key, data in changes}
            return message(kind="changes", **position), decompress(compress(tuple(merged.items())))
        return message(kind="snapshot", **position), decompress(compress(tuple(content.entries.items())))

    @rule(cell=st.integers(0, 1), saved=st.booleans())
    def restart(self, cell: int, saved: bool) -> None:
        if saved:
            self.cells[cell].save()
        self.cells[cell].start(self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 11.0, MAX_STALE + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for cell in self.cells:
            cell.follower.tick(self.now)
            if seconds > MAX_STALE:
                assert not cell.told, "what the centre said too long ago is still in force"

    # What must hold.

    @invariant()
    def listeners_know_what_the_replica_holds(self) -> None:
        for cell in self.cells if hasattr(self, "cells") else []:
            follower = cell.follower
            assert cell.told == follower.entries
            understood = {key for key, data in follower.content.entries.items() if data != pack("not understood")}
            assert set(follower.entries) == understood
            if follower.state is State.DEGRADED:
                assert not follower.entries

    def teardown(self) -> None:
        """The bus falls quiet: messages are lost no more, and heartbeats go on."""
        if not hasattr(self, "cells"):
            return
        for _ in range(20):
            self.now += 1
            self.wire.clear()
            self.heartbeat()
            for cell in self.cells:
                follower = cell.follower
                self.give(cell, *self.wire[-1])
                follower.tick(self.now)
                if follower.ask_at is not None and follower.ask_at <= self.now:
                    asked = follower.begin_ask()
                    follower.on_answer(*self.answer(asked.epoch, asked.since), self.now)
        content = self.sql.content()
        for cell in self.cells:
            follower = cell.follower
            assert follower.state is State.LIVE
            assert (follower.content.epoch, follower.revision) == (content.epoch, content.revision)
            assert follower.content.entries == content.entries
            assert cell.told == follower.entries


TestFollower = Machine.TestCase
TestFollower.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
