"""A replica's decisions in cases that random messages seldom make, each of which once went wrong or easily could."""

from typing import Any

import pytest

from bus.decode import Fields, Malformed
from bus.messages import Revision
from bus.tables import follower as following
from bus.tables.follower import LOWER_HEARTBEATS, SILENCE_SECONDS, Follower, State
from bus.tables.publisher import compress
from bus.tables.replica import decompress
from bus.tables.table import Content
from tests.bus.test_follower import TABLE, changes_of, message, on_the_wire


class Centre:
    """A database with its history, and what its servers say."""

    def __init__(self, epoch: str = "e0", revision: int = 0) -> None:
        self.content = Content(epoch)
        for number in range(revision):
            self.commit(number)

    def commit(self, value: int) -> Fields:
        """Write `a`; the change as it is published."""
        changes = changes_of({"a": value})
        revision = Revision(self.content.revision + 1)
        self.content.apply(revision, changes)
        return message(epoch=self.content.epoch, previous=revision - 1, revision=revision, changes=on_the_wire(changes))

    def heartbeat(self) -> Fields:
        return message(epoch=self.content.epoch, revision=self.content.revision, digest=self.content.digest)

    def answer(self, kind: str, **fields: Any) -> tuple[Fields, bytes]:
        data = b"" if kind == "current" else decompress(compress(tuple(self.content.entries.items())))
        position = {"epoch": self.content.epoch, "revision": self.content.revision, "digest": self.content.digest}
        return message(kind=kind, **position, **fields), data


def replica(centre: Centre | None = None, now: float = 100.0, max_stale: float = 1e6) -> Follower[int]:
    """A replica in sync with `centre`."""
    made = Follower(TABLE, lambda _: None, now=now, max_stale=max_stale)
    if centre is not None:
        made.begin_ask()
        made.on_answer(*centre.answer("snapshot"), now)
    return made


def questions(made: Follower[int], centre: Centre, now: float, seconds: float) -> int:
    """How often it asks in this time while the bus is quiet but for heartbeats; each is answered at once."""
    asked, end, beat = 0, now + seconds, now
    while now < end:
        if now >= beat:
            made.on_heartbeat(centre.heartbeat(), now)
            beat += 1
        made.tick(now)
        if made.ask_at is not None and made.ask_at <= now:
            whole = made.begin_ask().since < 0
            made.on_answer(*centre.answer("snapshot" if whole else "current"), now)
            asked += 1
        now += 0.01
    return asked


@pytest.mark.parametrize("stray", [Centre("another", 8), Centre("e0", 8)], ids=["another epoch", "a lost history"])
def test_a_change_that_never_follows_does_not_make_it_ask_for_ever(stray: Centre) -> None:
    centre = Centre(revision=3)
    made = replica(centre)
    made.on_change(stray.commit(1), 100.0)
    assert questions(made, centre, 100.0, 60) <= 3
    assert made.ask_at is None
    assert (made.state, made.content.entries) == (State.LIVE, centre.content.entries)
    for value in range(10):  # and it is not applied when its revision comes by at last
        made.on_change(centre.commit(100 + value), 161.0)
        assert made.content.entries == centre.content.entries


def test_the_bus_coming_back_ends_the_wait_before_asking_again() -> None:
    made = replica()
    for _ in range(10):
        made.begin_ask()
        made.on_no_answer(100.0)
    assert made.ask_at is not None
    assert made.ask_at > 104
    made.on_connect(100.0)
    assert made.ask_at <= 100.0 + following.JITTER_SECONDS


def test_the_centre_coming_back_ends_the_wait_before_asking_again() -> None:
    centre = Centre(revision=1)
    made = replica(centre)
    made.tick(100.0 + SILENCE_SECONDS + 1)
    for _ in range(10):
        made.begin_ask()
        made.on_no_answer(110.0)
    centre.commit(2)
    made.on_heartbeat(centre.heartbeat(), 110.0)
    assert made.ask_at is not None
    assert made.ask_at <= 110.0 + following.JITTER_SECONDS


def test_a_server_that_lags_behind_cannot_bring_an_old_revision_back() -> None:
    centre, lagging = Centre(revision=5), Centre(revision=4)
    made = replica(centre)
    made._want("digest", 100.0, whole=True)  # as another history of the same revision makes it
    assert made.begin_ask().since == -1
    made.on_answer(*lagging.answer("snapshot"), 100.0)
    assert made.revision == 5
    for beat in range(LOWER_HEARTBEATS):  # ... unless heartbeats insist: the database was restored
        assert made.revision == 5
        made.on_heartbeat(lagging.heartbeat(), 101.0 + beat)
    assert made.begin_ask().since == -1
    made.on_answer(*lagging.answer("snapshot"), 104.0)
    assert (made.revision, made.content.entries) == (4, lagging.content.entries)


def test_lower_heartbeats_must_come_in_a_row() -> None:
    centre, late = Centre(revision=5), Centre(revision=4)
    made = replica(centre)
    for second in range(20):
        for _ in range(LOWER_HEARTBEATS - 1):
            made.on_heartbeat(late.heartbeat(), 100.0 + second)
        made.on_heartbeat(centre.heartbeat(), 100.0 + second)
    assert made.ask_at is None


def test_heartbeats_while_the_whole_table_loads_do_not_make_it_load_twice() -> None:
    centre = Centre("new", 5)
    made = replica(Centre("old", 3))
    made.on_heartbeat(centre.heartbeat(), 100.0)
    assert made.begin_ask().since == -1
    made.on_heartbeat(centre.heartbeat(), 101.0)
    snapshot = centre.answer("snapshot")
    made.on_change(centre.commit(7), 101.5)
    made.on_heartbeat(centre.heartbeat(), 102.0)
    made.on_answer(*snapshot, 102.5)
    assert (made.revision, made.ask_at) == (6, None)
    made.on_change(centre.commit(8), 103.0)
    made._want("behind", 103.0)
    assert made.begin_ask().since == 7


def test_changes_while_the_whole_table_loads_wait_for_it() -> None:
    centre, other = Centre(revision=3), Centre(revision=2)
    other.commit(99)
    made = replica(centre)
    made.on_heartbeat(other.heartbeat(), 100.0)
    assert made.begin_ask().since == -1
    snapshot = other.answer("snapshot")
    made.on_change(other.commit(100), 100.1)
    assert made.revision == 3, "it does not follow on what we hold"
    made.on_answer(*snapshot, 100.2)
    assert (made.revision, made.content.entries) == (4, other.content.entries)


def test_changes_while_the_first_table_loads_wait_for_it() -> None:
    centre = Centre()
    made = replica()
    assert made.begin_ask().since == -1
    empty = centre.answer("snapshot")
    made.on_change(centre.commit(1), 100.1)
    made.on_answer(*empty, 100.2)
    assert made.revision == 1


def test_an_answer_confirms_only_what_its_server_vouches_for() -> None:
    centre = Centre(revision=1)
    made = replica(centre, max_stale=60.0)
    for now in range(110, 170, 5):  # the server answers, but has not seen its database since 100
        made.tick(now)
        assert made.state is (State.CACHED if now <= 160 else State.DEGRADED)
        made.begin_ask()
        made.on_answer(*centre.answer("current" if made.content.epoch else "snapshot", age=now - 100.0), now)
        assert made.state is not State.LIVE
    made.tick(170.0)
    assert (made.state, made.entries) == (State.DEGRADED, {})
    made.begin_ask()
    made.on_answer(*centre.answer("snapshot", age=0.5), 170.0)
    assert (made.state, made.confirmed_at) == (State.LIVE, 169.5)


def test_an_answer_that_is_not_a_list_of_changes_is_refused() -> None:
    made = replica(Centre(revision=1))
    for data in (b"\x05", b"\xc0", b"\x81\xa1a\x01", b"\xa1a"):
        for kind in ("changes", "snapshot"):
            made.begin_ask()
            with pytest.raises(Malformed):
                made.on_answer(message(kind=kind, epoch="e0", revision=9, digest=b"x"), data, 100.0)


def test_a_change_of_another_epoch_is_not_applied() -> None:
    centre = Centre(revision=3)
    made = replica(centre)
    made.on_change(Centre("another", 3).commit(99), 100.0)
    assert (made.revision, made.content.entries) == (3, centre.content.entries)
    assert made.ask_at is not None


def test_another_digest_at_the_same_revision_is_not_confirmed_and_the_whole_table_taken() -> None:
    other = Centre(revision=2)
    made = replica(Centre(revision=3))
    other.commit(99)
    made.on_heartbeat(other.heartbeat(), 101.0)
    assert made.confirmed_at == 100.0
    assert made.begin_ask().since == -1
    made.on_no_answer(101.0)
    assert made.begin_ask().since == -1, "the need for it is not forgotten when nobody answers"
    made.on_answer(*other.answer("snapshot"), 102.0)
    assert (made.content.entries, made.confirmed_at) == (other.content.entries, 102.0)


def test_a_snapshot_that_is_not_what_it_says_is_refused() -> None:
    centre = Centre(revision=3)
    made = replica(centre)
    head, _ = Centre(revision=5).answer("snapshot")
    _, data = centre.answer("snapshot")
    made.begin_ask()
    with pytest.raises(Malformed, match="digest"):
        made.on_answer(head, data, 100.0)
    assert made.revision == 3


@pytest.mark.parametrize(("age", "used"), [(59.0, True), (61.0, False), (None, False)])
def test_a_remembered_state_is_used_only_while_it_is_not_too_old(age: float | None, used: bool) -> None:
    content = Centre(revision=3).content
    made = Follower(TABLE, lambda _: None, now=100.0, max_stale=60.0, content=content, age=age)
    assert bool(made.entries) is used
    made.tick(100.5)
    assert bool(made.entries) is used
    made.tick(111.0)  # too old by now in any case, and nobody has answered
    assert (made.state, made.entries) == (State.DEGRADED, {})


def test_kept_changes_of_a_lost_history_are_forgotten_with_it() -> None:
    centre, lost = Centre(revision=4), Centre(revision=5)
    made = replica(Centre(revision=3))
    made.on_change(lost.commit(99), 100.0)  # revision 6, of which 5 was never heard
    for beat in range(LOWER_HEARTBEATS):
        made.on_heartbeat(Centre(revision=2).heartbeat(), 101.0 + beat)
    assert made.begin_ask().since == -1
    centre.commit(5)
    made.on_answer(*centre.answer("snapshot"), 104.0)
    assert (made.revision, made.content.entries) == (5, centre.content.entries)


def test_an_answer_that_live_changes_have_overtaken_is_nothing() -> None:
    centre = Centre(revision=3)
    made = replica(centre)
    made.begin_ask()
    late = centre.answer("current")
    made.on_change(centre.commit(99), 100.1)
    made.on_answer(*late, 100.2)
    assert (made.revision, made.ask_at) == (4, None)


def test_old_news_is_not_asked_about() -> None:
    made = replica(Centre(revision=3))
    made.on_change(message(epoch="e0", previous=2, revision=3), 100.0)  # the header alone, repeated
    assert made.ask_at is None


def test_changes_that_wait_are_not_kept_without_bound() -> None:
    made, far = replica(Centre(revision=1)), Centre(revision=2)
    for value in range(following.MAX_WAITING + 1):
        made.on_change(far.commit(value), 100.0)
    assert len(made._waiting) <= following.MAX_WAITING
    assert made.begin_ask().since == -1


def test_a_snapshot_reaches_listeners_as_the_difference() -> None:
    told: list[Any] = []
    centre = Centre("old")
    for name in "abc":
        centre.content.apply(Revision(1), changes_of({name: 1}))
    made = Follower(TABLE, lambda update: told.append(dict(update.changes)), now=0.0, max_stale=60.0)
    made.begin_ask()
    made.on_answer(*centre.answer("snapshot"), 0.0)
    centre.content.epoch = "new"
    centre.content.apply(Revision(2), changes_of({"a": None, "b": 2, "d": 1}))
    made.on_heartbeat(centre.heartbeat(), 1.0)
    made.begin_ask()
    made.on_answer(*centre.answer("snapshot"), 1.0)
    assert told == [{("a",): 1, ("b",): 1, ("c",): 1}, {("a",): None, ("b",): 2, ("d",): 1}]
