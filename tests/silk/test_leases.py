"""The leases in SQL, on a real SQLite file."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from databases import Database

from bus.database import open_database
from bus.ledger import Ledger
from bus.messages import CellName, Lease, lease_key
from services.silk import leases
from services.silk.leases import MIGRATIONS, LeaseRefused, LeaseStore
from services.silk.subnets import subnet_pool, vtep_address, vtep_mac

OVERLAY = IPv4Network("10.255.0.0/16")
SMALL = IPv4Network("10.255.0.0/22")
EXPIRY = 1000


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_database(f"sqlite:///{tmp_path / 'silk.db'}") as opened:
        yield opened


async def store(database: Database, overlay: IPv4Network = OVERLAY, length: int = 24) -> LeaseStore:
    ledger = Ledger(database, "leases")
    await ledger.migrate(MIGRATIONS)
    return LeaseStore(ledger, overlay, length, EXPIRY)


def cell(number: int) -> tuple[CellName, IPv4Address]:
    return CellName(f"cell-{number}"), IPv4Address("10.0.0.0") + number


async def lease(store: LeaseStore, number: int) -> Lease:
    result = (await store.acquire(*cell(number))).result
    assert result is not None
    return result


async def table(store: LeaseStore, database: Database) -> dict[tuple[str, ...], object]:
    async with database.connection() as connection:
        return dict(await store.entries(connection))


def test_pool_is_all_subnets_but_the_first() -> None:
    pool = list(subnet_pool(OVERLAY, 24))
    assert len(pool) == 255
    assert (pool[0], pool[-1]) == (IPv4Network("10.255.1.0/24"), IPv4Network("10.255.255.0/24"))


def test_mac_follows_from_the_subnet() -> None:
    assert vtep_mac(IPv4Network("10.255.17.0/24")) == "ee:ee:0a:ff:11:00"
    assert vtep_address("ee:ee:0a:ff:11:00") == IPv4Address("10.255.17.0")
    assert vtep_address("aa:aa:0a:ff:11:00") is None


async def test_a_cell_keeps_its_subnet(database: Database) -> None:
    leases = await store(database)
    first = await leases.acquire(*cell(1))
    assert first.changed
    assert first.result == Lease(IPv4Network("10.255.1.0/24"), *cell(1), "ee:ee:0a:ff:01:00")
    again = await (await store(database)).acquire(*cell(1))
    assert (again.result, again.changed, again.revision) == (first.result, False, first.revision)


async def test_a_cell_made_anew_at_another_address_keeps_its_subnet(database: Database) -> None:
    leases = await store(database)
    first = await lease(leases, 1)
    moved = await leases.acquire(first.cell, IPv4Address("10.0.9.9"))
    assert moved.changed
    assert moved.result == Lease(first.subnet, first.cell, IPv4Address("10.0.9.9"), first.mac)
    assert list((await table(leases, database)).values()) == [moved.result.encode()]
    assert not await leases.renew(first)


async def test_an_underlay_address_of_another_cell_is_refused(database: Database) -> None:
    leases = await store(database)
    await lease(leases, 1)
    with pytest.raises(LeaseRefused, match=r"10\.0\.0\.1 belongs to cell cell-1, which has 10\.255\.1\.0/24"):
        await leases.acquire(CellName("impostor"), IPv4Address("10.0.0.1"))


async def test_only_the_exact_lease_is_renewed(database: Database) -> None:
    leases = await store(database)
    own = await lease(leases, 1)
    await database.execute("UPDATE leases SET renewed_at = 5")
    assert await leases.renew(own)
    assert await database.fetch_val("SELECT renewed_at FROM leases") > 1_000_000
    await leases.release(own)
    assert not await leases.renew(own)
    assert await table(leases, database) == {}


async def test_the_longest_released_comes_last(database: Database) -> None:
    leases = await store(database, SMALL)
    held = [await lease(leases, number) for number in (1, 2)]
    for number, released in enumerate(held):
        await leases.release(released)
        await database.execute(
            "UPDATE former_leases SET released_at = :at WHERE subnet = :subnet",
            {"at": 100 - number, "subnet": str(released.subnet)},
        )
    given = [str((await lease(leases, number)).subnet) for number in (3, 4, 5)]
    assert given == ["10.255.3.0/24", "10.255.2.0/24", "10.255.1.0/24"]


async def test_an_exhausted_pool_says_so_and_gives_only_what_expired(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = await store(database, SMALL)
    held = [await lease(full, number) for number in (1, 2, 3)]
    with pytest.raises(LeaseRefused, match=r"no subnet /24 of 10\.255\.0\.0/22 is free"):
        await full.acquire(*cell(4))
    await database.execute("UPDATE leases SET renewed_at = 5 WHERE cell = 'cell-2'")
    await database.execute("UPDATE leases SET renewed_at = 9 WHERE cell = 'cell-3'")
    with pytest.raises(LeaseRefused, match="after all could renew"):
        await full.acquire(*cell(4))
    monkeypatch.setattr(leases, "MAX_SETTLING", 0)
    settled = await store(database, SMALL)
    taken = await settled.acquire(*cell(4))
    assert taken.result is not None
    assert taken.result.subnet == held[1].subnet
    assert [key for key, _ in taken.changes] == [lease_key(held[1].subnet)]
    assert not await settled.renew(held[1])
    assert await settled.renew(held[2]), "one that expired and was not given away may go on"


async def test_a_subnet_outside_the_pool_is_replaced(database: Database) -> None:
    old = await lease(await store(database), 1)
    moved = await store(database, IPv4Network("10.100.0.0/16"))
    new = await lease(moved, 1)
    assert new.subnet == IPv4Network("10.100.1.0/24")
    assert list(await table(moved, database)) == [lease_key(new.subnet)]
    assert not await moved.renew(old)


async def test_many_at_once_never_share(database: Database) -> None:
    """Cells acquire, renew and release at random, through two stores; then the table is what they believe."""
    stores = [await store(database, IPv4Network("10.255.0.0/19")), await store(database, IPv4Network("10.255.0.0/19"))]
    believed: dict[int, Lease] = {}

    async def live(number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        for _ in range(12):
            leases = chance.choice(stores)
            action = chance.choice(["acquire", "renew", "release"])
            if action == "acquire":
                # There are fewer subnets than cells; who has one keeps it.
                with suppress(LeaseRefused) if number not in believed else nullcontext():
                    believed[number] = await lease(leases, number)
            elif number in believed and action == "renew":
                assert await leases.renew(believed[number])
            elif number in believed:
                await leases.release(believed.pop(number))

    await asyncio.gather(*(live(number) for number in range(1, 37)))
    held = await table(stores[0], database)
    assert held == {lease_key(each.subnet): each.encode() for each in believed.values()}
    assert len({each.subnet for each in believed.values()}) == len(believed)
    assert (await stores[0]._ledger.content(stores[0].entries))[0].entries.keys() == held.keys()


async def test_all_cells_renew_at_once(database: Database) -> None:
    """As after an outage of the bus, while others acquire."""
    leases = await store(database)
    held = [await lease(leases, number) for number in range(1, 101)]
    renewals = [leases.renew(each) for each in held for _ in range(3)]
    fresh = [lease(leases, number) for number in range(101, 121)]
    done = await asyncio.gather(*renewals, *fresh)
    assert done[:300] == [True] * 300
    assert len(await table(leases, database)) == 120
