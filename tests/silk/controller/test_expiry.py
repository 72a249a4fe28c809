"""When leases end, on each kind of database whose clock the test can set."""

import time
from dataclasses import dataclass, field
from ipaddress import IPv4Network

import httpx
import pytest
from databases import Database

from services.silk import schema
from services.silk.expiry import LOW_SHARE, Expiry, Hearing, end_expired
from services.silk.lease_api import LeaseApi
from services.silk.leases import Exhausted, LeaseLost, LeaseStore, Terms
from services.silk.pool import Kind
from tests.silk.controller.conftest import EXPIRY, OVERLAY, REST, SMALL, MakeStore, lease, pass_time, table

GRACE = 120.0
DAY = 86_400


@dataclass
class Watch:
    """A machine's clock that the test sets, beside the real one."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@dataclass
class Centre:
    """A controller's expiry on a store, past its grace unless told otherwise."""

    store: LeaseStore
    share: float = 0.2
    connected: bool = True
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        self.hearing = Hearing(GRACE, self.watch)
        self.expiry = Expiry(self.store, self.hearing, share=self.share, connected=lambda: self.connected)
        self.watch.ahead = GRACE + 1

    async def look(self) -> set[str]:
        """The cells that have leases after a look."""
        await self.expiry.look()
        return {str(entry["cell"]) for entry in (await table(self.store)).values()}  # type: ignore[index]


@pytest.fixture
async def settable_clock(opened: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The database's clock goes as far ahead as its table `ahead` says; stores made from now on go by that."""
    await opened.execute("CREATE TABLE ahead (seconds BIGINT)")
    await opened.execute("INSERT INTO ahead (seconds) VALUES (0)")
    kind = opened.url.dialect
    monkeypatch.setitem(schema.CLOCK, kind, f"({schema.CLOCK[kind]} + (SELECT seconds FROM ahead))")  # noqa: S608
    return opened


async def set_clock(database: Database, ahead: int) -> None:
    await database.execute("UPDATE ahead SET seconds = :ahead", {"ahead": ahead})


async def test_a_lease_that_is_not_renewed_ends_and_its_subnet_rests(make_store: MakeStore, opened: Database) -> None:
    centre = Centre(make_store(SMALL))
    held = [await lease(centre.store, number) for number in (1, 2, 3)]
    await pass_time(opened, EXPIRY - 100)
    await centre.store.renew(held[0])
    await centre.store.renew(held[2])
    assert await centre.look() == {"cell-1", "cell-2", "cell-3"}
    await pass_time(opened, 102)
    assert await centre.store.all() == held, "listed until it is ended"
    assert await centre.look() == {"cell-1", "cell-3"}
    last = (await centre.store.ledger.log_from(0))[-1]  # type: ignore[arg-type]
    assert last.events[0]["kind"] == "lease.expired"
    assert (last.actor, dict(last.changes)) == ("silk-controller", {(str(held[1].subnet),): None})
    with pytest.raises(Exhausted):
        await lease(centre.store, 4)
    await pass_time(opened, REST)
    assert (await lease(centre.store, 4)).subnet == held[1].subnet
    with pytest.raises(LeaseLost):
        await centre.store.renew(held[1])


async def test_its_cell_has_it_again_if_nobody_else_got_it(make_store: MakeStore, opened: Database) -> None:
    centre = Centre(make_store())
    own = await lease(centre.store, 1)
    await pass_time(opened, EXPIRY + 1)
    assert await centre.look() == set()
    await centre.store.renew(own)
    assert await centre.look() == {"cell-1"}


async def test_nothing_ends_before_all_could_renew(make_store: MakeStore, opened: Database) -> None:
    centre = Centre(make_store())
    centre.watch.ahead = 0
    await lease(centre.store, 1)
    await pass_time(opened, 10 * EXPIRY)
    assert await centre.look() == {"cell-1"}
    centre.watch.ahead = GRACE - 5
    assert await centre.look() == {"cell-1"}
    centre.connected = False
    centre.watch.ahead = GRACE + 5
    assert await centre.look() == {"cell-1"}
    centre.connected = True
    centre.watch.ahead = 2 * GRACE
    assert await centre.look() == {"cell-1"}, "no bus since a while ago: not all were heard"
    centre.watch.ahead = 2 * GRACE + 10
    assert await centre.look() == set()


async def test_mass_expiry_is_refused_until_they_renew_or_somebody_says_so(
    make_store: MakeStore, opened: Database
) -> None:
    centre = Centre(make_store())
    held = [await lease(centre.store, number) for number in range(1, 11)]
    everybody = {each.cell for each in held}
    await pass_time(opened, EXPIRY - 10)
    for each in held[:7]:
        await centre.store.renew(each)
    await pass_time(opened, 11)
    assert await centre.look() == everybody
    assert centre.expiry.problem is not None
    assert (
        "3 of 10 leases have not been renewed for half their time, and at most 2 may be that" in centre.expiry.problem
    )
    assert "the 3 that are due are kept" in centre.expiry.problem
    transport = httpx.ASGITransport(LeaseApi(centre.store).application())
    async with httpx.AsyncClient(transport=transport, base_url="http://silk") as daemon:
        assert len((await daemon.get("/leases")).json()["leases"]) == 10, "or daemons would drop those three"
    await centre.store.renew(held[7])
    assert await centre.look() == everybody - {held[8].cell, held[9].cell}
    assert centre.expiry.problem is None
    await pass_time(opened, EXPIRY + 1)
    assert len(await centre.look()) == 8
    ended = await end_expired(centre.store, "an operator")
    assert ended.result is not None
    assert len(ended.result) == 8
    assert await centre.look() == set()
    assert centre.expiry.problem is None


async def test_those_that_fell_silent_together_are_not_ended_one_by_one(
    make_store: MakeStore, opened: Database
) -> None:
    """They renewed at different moments, so the first is due when the others are not yet."""
    centre = Centre(make_store())
    held = [await lease(centre.store, number) for number in range(1, 11)]
    for each in held:
        await opened.execute("UPDATE leases SET renewed_at = renewed_at - 3")
        await centre.store.renew(each)
    await pass_time(opened, EXPIRY - 29)
    for _ in range(5):
        await pass_time(opened, 6)
        assert len(await centre.look()) == 10
    assert centre.expiry.problem is not None


async def test_the_only_cell_may_expire(make_store: MakeStore, opened: Database) -> None:
    centre = Centre(make_store(), share=0)
    await lease(centre.store, 1)
    await pass_time(opened, EXPIRY + 1)
    assert await centre.look() == set()


async def test_a_jump_of_the_databases_clock_ends_nothing(settable_clock: Database, make_store: MakeStore) -> None:
    centre = Centre(make_store(), share=1)
    own = await lease(centre.store, 1)
    assert await centre.look() == {"cell-1"}
    await set_clock(settable_clock, 30 * DAY)
    assert await centre.look() == {"cell-1"}
    assert centre.hearing.wait > GRACE - 10
    await centre.store.renew(own)
    centre.watch.ahead *= 2
    assert await centre.look() == {"cell-1"}
    await pass_time(settable_clock, EXPIRY + 1)
    assert await centre.look() == set(), "one that is silent after that is gone"


async def test_a_clock_that_is_set_back_keeps_nothing_longer(settable_clock: Database, make_store: MakeStore) -> None:
    centre = Centre(make_store(SMALL), share=1)
    await set_clock(settable_clock, 30 * DAY)
    held = [await lease(centre.store, number) for number in (1, 2, 3)]
    await centre.store.release(held[0])
    await set_clock(settable_clock, 0)
    assert await centre.look() == {"cell-2", "cell-3"}
    centre.watch.ahead *= 2
    await pass_time(settable_clock, EXPIRY + 1)
    assert await centre.look() == set()
    assert (await lease(centre.store, 4)).subnet == held[0].subnet


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_pause_of_the_controller_counts_as_not_hearing(
    make_store: MakeStore, opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    centre = Centre(make_store())
    await lease(centre.store, 1)
    await centre.look()
    ahead = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: ahead)
    await pass_time(opened, EXPIRY + 1)
    assert await centre.look() == {"cell-1"}
    assert centre.hearing.wait > GRACE - 10


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_it_says_when_subnets_run_out(make_store: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(IPv4Network("10.255.0.0/19"))
    centre = Centre(store)
    size = store.terms.pool.size(Kind.BLOCK)
    for number in range(1, size + 1):
        await lease(store, number)
        await centre.look()
        low = (size - number) < size * LOW_SHARE
        assert ("subnets are running out" in caplog.text) == low
    await lease(make_store(OVERLAY), size + 1)
    assert caplog.text.count("subnets are running out") == 1, "once is enough"


async def test_a_shorter_expiry_does_not_break_what_cells_were_told(make_store: MakeStore, opened: Database) -> None:
    """A cell that is cut off goes by what it was told, and nobody may have its subnet until then."""
    store = make_store()
    held = [await lease(store, number) for number in (1, 2)]
    shorter = Centre(LeaseStore(store.ledger, Terms(store.terms.pool, EXPIRY // 10, REST)), share=1)
    await shorter.store.renew(held[1])
    await pass_time(opened, EXPIRY // 10 + 1)
    assert await shorter.look() == {"cell-1"}
    await pass_time(opened, EXPIRY)
    assert await shorter.look() == set()
