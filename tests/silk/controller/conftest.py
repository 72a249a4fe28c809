"""What tests of the Silk controller share: databases, stores on them, and time that passes for the database."""

from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv4Network

import pytest
from databases import Database

from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.ledger import Ledger
from bus.messages import CellName, Lease
from services.silk.leases import LeaseStore, Terms
from services.silk.pool import Pool
from services.silk.schema import MIGRATIONS
from tests.databases import EmptyDatabase, database, mariadb, postgresql

__all__ = ["database", "mariadb", "postgresql"]

OVERLAY = IPv4Network("10.255.0.0/16")
SMALL = IPv4Network("10.255.0.0/22")
"""Three blocks."""
EXPIRY = 1000
REST = 100

MakeStore = Callable[..., LeaseStore]


@pytest.fixture
async def opened(database: EmptyDatabase) -> AsyncIterator[Database]:
    """The test's database, with the schema of the leases."""
    async with open_database(database.url, DatabaseOptions()) as connected:
        await Ledger(connected, "leases").migrate(MIGRATIONS)
        yield connected


@pytest.fixture
def make_store(opened: Database) -> MakeStore:
    """Makes a store on it, as each controller has one."""

    def make(*networks: IPv4Network, length: int = 24, rest: int = REST, **more: object) -> LeaseStore:
        terms = Terms(Pool(networks or (OVERLAY,), length), EXPIRY, rest)
        return LeaseStore(Ledger(opened, "leases"), terms, **more)  # type: ignore[arg-type]

    return make


async def pass_time(database: Database, seconds: int) -> None:
    """Let the database's clock go on by so much: every time written down is as much longer ago."""
    passed = {"seconds": seconds}
    await database.execute("UPDATE leases SET renewed_at = renewed_at - :seconds", passed)
    await database.execute("UPDATE former_leases SET released_at = released_at - :seconds", passed)


def cell(number: int) -> tuple[CellName, IPv4Address]:
    return CellName(f"cell-{number}"), IPv4Address("10.0.0.0") + number


async def lease(store: LeaseStore, number: int) -> Lease:
    result = (await store.acquire(*cell(number))).result
    assert result is not None
    return result


async def table(store: LeaseStore) -> dict[tuple[str, ...], object]:
    """What the bus has of the leases."""
    async with store.ledger.database.connection() as connection:
        return dict(await store.entries(connection))
