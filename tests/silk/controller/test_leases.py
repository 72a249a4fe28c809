"""The rules of leases, on each kind of database."""

import asyncio
import random
from contextlib import nullcontext, suppress
from ipaddress import IPv4Address, IPv4Network

import pytest
from databases import Database

from bus.messages import CellName, Lease, lease_key
from services.silk.leases import Exhausted, LeaseLost, LeaseRefused, OutsidePool
from services.silk.pool import Kind
from tests.silk.controller.conftest import OVERLAY, REST, SMALL, MakeStore, cell, lease, pass_time, table

SINGLE_NETWORK = IPv4Network("10.254.0.0/29")
"""With blocks of /30: one block, and three singles."""
ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


async def test_a_cell_keeps_its_subnet(make_store: MakeStore) -> None:
    first = await make_store().acquire(*cell(1))
    assert first.changed
    assert first.result == Lease(IPv4Network("10.255.1.0/24"), *cell(1), "ee:ee:0a:ff:01:00")
    again = await make_store().acquire(*cell(1))
    assert (again.result, again.changed, again.revision) == (first.result, False, first.revision)


async def test_acquiring_again_renews(make_store: MakeStore, opened: Database) -> None:
    await lease(make_store(), 1)
    await pass_time(opened, 500)
    before = await opened.fetch_val("SELECT renewed_at FROM leases")
    await lease(make_store(), 1)
    assert await opened.fetch_val("SELECT renewed_at FROM leases") >= before + 500


async def test_a_cell_made_anew_at_another_address_keeps_its_subnet(make_store: MakeStore) -> None:
    store = make_store()
    first = await lease(store, 1)
    moved = await store.acquire(first.cell, IPv4Address("10.0.9.9"))
    assert moved.changed
    assert moved.result == Lease(first.subnet, first.cell, IPv4Address("10.0.9.9"), first.mac)
    assert list((await table(store)).values()) == [moved.result.encode()]
    with pytest.raises(LeaseLost):
        await store.renew(first)


async def test_names_are_told_apart_by_case(make_store: MakeStore) -> None:
    store = make_store()
    one = await store.acquire(CellName("cell"), IPv4Address("10.0.0.1"))
    other = await store.acquire(CellName("CELL"), IPv4Address("10.0.0.2"))
    assert one.result is not None
    assert other.result is not None
    assert one.result.subnet != other.result.subnet
    assert one.result.cell == "cell"


@ON_SQLITE
async def test_an_underlay_address_of_another_cell_is_refused(make_store: MakeStore) -> None:
    store = make_store()
    await lease(store, 1)
    with pytest.raises(LeaseRefused, match=r"10\.0\.0\.1 belongs to cell cell-1, which has 10\.255\.1\.0/24"):
        await store.acquire(CellName("impostor"), IPv4Address("10.0.0.1"))


async def test_only_the_exact_lease_is_renewed(make_store: MakeStore, opened: Database) -> None:
    store = make_store()
    own = await lease(store, 1)
    await opened.execute("UPDATE leases SET renewed_at = 5")
    await store.renew(own)
    assert await opened.fetch_val("SELECT renewed_at FROM leases") > 1_000_000
    for other in (
        Lease(own.subnet, own.cell, own.underlay, "ee:ee:00:00:00:00"),
        Lease(own.subnet, CellName("x"), own.underlay, own.mac),
        Lease(IPv4Network("10.255.2.0/24"), own.cell, own.underlay, "ee:ee:0a:ff:02:00"),
    ):
        with pytest.raises(LeaseLost):
            await store.renew(other)
    await store.release(own)
    for _ in range(2):
        with pytest.raises(LeaseLost):
            await store.renew(own)
        await pass_time(opened, REST + 1)
    assert await table(store) == {}


async def test_renewals_have_no_revision(make_store: MakeStore) -> None:
    store = make_store()
    own = await lease(store, 1)
    before = await store.ledger.head()
    await asyncio.gather(*(store.renew(own) for _ in range(10)))
    assert await store.ledger.head() == before


async def test_what_was_released_rests_but_not_for_its_owner(make_store: MakeStore, opened: Database) -> None:
    store = make_store(SMALL)
    held = [await lease(store, number) for number in (1, 2, 3)]
    await store.release(held[1])
    assert await lease(store, 2) == held[1]
    await store.release(held[1])
    with pytest.raises(Exhausted, match=r"no subnet /24 of 10\.255\.0\.0/22 is free: of 3 2 are leased and 1 rest, "):
        await lease(store, 4)
    await pass_time(opened, REST - 5)
    with pytest.raises(Exhausted, match=r"the next for [1-5] s more"):
        await lease(store, 4)
    await pass_time(opened, 5)
    assert (await lease(store, 4)).subnet == held[1].subnet


async def test_the_longest_released_comes_last(make_store: MakeStore, opened: Database) -> None:
    store = make_store(SMALL, rest=0)
    held = [await lease(store, number) for number in (1, 2)]
    for released in reversed(held):
        await store.release(released)
        await pass_time(opened, 10)
    given = [str((await lease(store, number)).subnet) for number in (3, 4, 5)]
    assert given == ["10.255.3.0/24", "10.255.2.0/24", "10.255.1.0/24"]


async def test_single_addresses(make_store: MakeStore) -> None:
    store = make_store(SINGLE_NETWORK, length=30)
    given = [await store.acquire(*cell(number), Kind.SINGLE) for number in (1, 2, 3)]
    assert [str(each.result and each.result.subnet) for each in given] == [f"10.254.0.{n}/32" for n in (1, 2, 3)]
    with pytest.raises(Exhausted, match=r"no single address of 10\.254\.0\.0/29 is free: of 3 3 are leased"):
        await store.acquire(*cell(4), Kind.SINGLE)
    assert str((await lease(store, 4)).subnet) == "10.254.0.4/30"
    with pytest.raises(Exhausted, match="of 1 1 are leased"):
        await lease(store, 5)


@ON_SQLITE
async def test_the_kind_asked_for_is_given(make_store: MakeStore) -> None:
    store = make_store()
    await lease(store, 1)
    single = (await store.acquire(*cell(1), Kind.SINGLE)).result
    assert single is not None
    assert str(single.subnet) == "10.255.0.1/32"
    assert list(await table(store)) == [("10.255.0.1/32",)]
    assert str((await lease(store, 1)).subnet) == "10.255.1.0/24", "what it had, though that rests"


async def test_a_network_added_helps_at_once_and_moves_nobody(make_store: MakeStore) -> None:
    full = make_store(SMALL)
    held = [await lease(full, number) for number in (1, 2, 3)]
    with pytest.raises(Exhausted):
        await lease(full, 4)
    larger = make_store(SMALL, IPv4Network("10.100.0.0/23"))
    assert (await lease(larger, 4)).subnet == IPv4Network("10.100.1.0/24")
    for each in held:
        await larger.renew(each)


async def test_a_subnet_outside_the_pool_is_refused_and_replaced(make_store: MakeStore) -> None:
    old = await lease(make_store(), 1)
    moved = make_store(IPv4Network("10.100.0.0/16"))
    with pytest.raises(OutsidePool, match=r"10\.255\.1\.0/24 is none of the pool 10\.100\.0\.0/16 in blocks of /24"):
        await moved.renew(old)
    new = await lease(moved, 1)
    assert new.subnet == IPv4Network("10.100.1.0/24")
    assert list(await table(moved)) == [lease_key(new.subnet)]
    with pytest.raises(LeaseLost):
        await moved.renew(old)


async def test_another_size_never_overlaps_what_is_leased(make_store: MakeStore) -> None:
    held = [await lease(make_store(SMALL), number) for number in (1, 2)]
    finer = make_store(SMALL, length=26)
    given = [await lease(finer, number) for number in range(3, 10)]
    assert not any(one.subnet.overlaps(other.subnet) for one in held for other in given)
    assert len({each.subnet for each in given}) == 7


@ON_SQLITE
async def test_a_lost_subnet_is_given_back_if_it_is_free(make_store: MakeStore) -> None:
    """A database that was restored may not know of it."""
    store = make_store()
    had = IPv4Network("10.255.77.0/24")
    outcome = await store.acquire(*cell(1), had=had)
    assert outcome.result is not None
    assert outcome.result.subnet == had
    for wish in (had, IPv4Network("10.1.1.0/24"), IPv4Network("10.255.9.0/25")):
        other = await store.acquire(*cell(2), had=wish)
        assert other.result is not None
        assert other.result.subnet == IPv4Network("10.255.1.0/24")
        await store.release(other.result)


async def test_a_cell_known_by_its_address_is_taken_over_by_the_one_with_a_name(make_store: MakeStore) -> None:
    store = make_store()
    before = (await store.acquire_at(IPv4Address("10.0.0.1"))).result
    assert before is not None
    assert before.cell == "ip-10-0-0-1"
    named = await store.acquire(*cell(1))
    assert named.result == Lease(before.subnet, *cell(1), before.mac)
    assert len(await table(store)) == 1
    with pytest.raises(LeaseLost):
        await store.renew(before)
    back = await store.acquire_at(IPv4Address("10.0.0.1"))
    assert (back.result, back.changed) == (named.result, False)
    await store.renew_at(IPv4Address("10.0.0.1"), str(before.subnet), before.mac)
    with pytest.raises(LeaseRefused, match="belongs to cell cell-1"):
        await store.acquire(CellName("ip-10-0-0-1"), IPv4Address("10.0.0.1"))


@ON_SQLITE
async def test_what_the_originals_daemon_gave_back_is_its_cells_again(make_store: MakeStore) -> None:
    """A cell that changes from the original's daemon to our worker: its scripts release before they start anew."""
    store = make_store(SMALL)
    had = (await store.acquire_at(IPv4Address("10.0.0.1"))).result
    assert had is not None
    await store.release(had)
    assert (await store.acquire(*cell(1))).result == Lease(had.subnet, *cell(1), had.mac)


async def test_two_leases_become_one(make_store: MakeStore) -> None:
    """A cell with a name moves to an address that was known without one."""
    store = make_store()
    own = await lease(store, 1)
    await store.acquire_at(IPv4Address("10.0.0.2"))
    moved = (await store.acquire(own.cell, IPv4Address("10.0.0.2"))).result
    assert moved == Lease(own.subnet, own.cell, IPv4Address("10.0.0.2"), own.mac)
    assert list(await table(store)) == [lease_key(own.subnet)]


async def test_many_at_once_never_share(make_store: MakeStore) -> None:
    """Cells acquire, renew and release at random, through two stores; then the table is what they believe."""
    stores = [make_store(IPv4Network("10.255.0.0/19"), rest=0) for _ in range(2)]
    believed: dict[int, Lease] = {}

    async def live(number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        for _ in range(10):
            store = chance.choice(stores)
            action = chance.choice(["acquire", "renew", "release"])
            if action == "acquire":
                # There are fewer subnets than cells; who has one keeps it.
                with suppress(LeaseRefused) if number not in believed else nullcontext():
                    believed[number] = await lease(store, number)
            elif number in believed and action == "renew":
                await store.renew(believed[number])
            elif number in believed:
                await store.release(believed.pop(number))

    await asyncio.gather(*(live(number) for number in range(1, 37)))
    held = await table(stores[0])
    assert held == {lease_key(each.subnet): each.encode() for each in believed.values()}
    assert len({each.subnet for each in believed.values()}) == len(believed)
    assert (await stores[0].ledger.content(stores[0].entries))[0].entries.keys() == held.keys()


async def test_all_cells_renew_at_once(make_store: MakeStore, opened: Database) -> None:
    """As after an outage of the bus, through two controllers, while others acquire; nobody renews another's."""
    stores = [make_store(OVERLAY) for _ in range(2)]
    held = [await lease(stores[0], number) for number in range(1, 61)]
    await pass_time(opened, 500)
    impostors = [Lease(each.subnet, CellName("impostor"), each.underlay, each.mac) for each in held[:10]]
    renewals = [store.renew(each) for each in held[10:] for store in stores]
    fresh = [lease(stores[0], number) for number in range(101, 111)]
    done = await asyncio.gather(*renewals, *map(stores[1].renew, impostors), *fresh, return_exceptions=True)
    assert done[:100] == [None] * 100
    assert all(isinstance(error, LeaseLost) for error in done[100:110])
    assert len(await table(stores[0])) == 70
    old = await opened.fetch_all(
        "SELECT cell FROM leases WHERE renewed_at < (SELECT MAX(renewed_at) FROM leases) - 400"
    )
    assert {row["cell"] for row in old} == {each.cell for each in held[:10]}
