"""The Silk controller's database: opened, with its schema brought up to date (bus/opening.py)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bus import opening
from bus.database_options import DatabaseOptions
from bus.ledger import Ledger
from bus.opening import CannotOpen as CannotOpen
from bus.tables import LEASES
from services.silk.schema import MIGRATIONS

PATIENCE = 4.0
"""Seconds for which a request is tried again while the database is away: cells wait for five, and ask again."""


@asynccontextmanager
async def open_ledger(url: str, options: DatabaseOptions, *, migrate: bool = True) -> AsyncIterator[Ledger]:
    """The ledger of the `leases` table in the database at `url`. Raises CannotOpen."""
    async with opening.open_ledgers(
        url, options, (LEASES.name,), MIGRATIONS, patience=PATIENCE, migrate=migrate
    ) as ledgers:
        yield ledgers[0]


async def pending(url: str, options: DatabaseOptions) -> list[str]:
    """The steps that the schema lacks, in order. Raises CannotOpen."""
    return await opening.pending(url, options, LEASES.name, MIGRATIONS, patience=PATIENCE)
