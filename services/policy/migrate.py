"""The policy server's database: opened, with its schema brought up to date (bus/opening.py)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bus import opening
from bus.database_options import DatabaseOptions
from bus.ledger import Ledger
from bus.opening import CannotOpen as CannotOpen
from bus.opening import reason as reason
from bus.tables import POLICIES, SECURITY_GROUPS
from services.policy.schema import MIGRATIONS

PATIENCE = 5.0
"""Seconds for which a request is tried again while the database is away: clients should hear of it soon."""


@asynccontextmanager
async def open_ledger(url: str, options: DatabaseOptions, *, migrate: bool = True) -> AsyncIterator[Ledger]:
    """The ledger of the `policies` table in the database at `url`, its schema up to date unless told otherwise.

    Raises CannotOpen.
    """
    tables = (POLICIES.name, SECURITY_GROUPS.name)
    async with opening.open_ledgers(url, options, tables, MIGRATIONS, patience=PATIENCE, migrate=migrate) as ledgers:
        yield ledgers[0]


def security_groups_ledger(policies: Ledger) -> Ledger:
    """The ledger of the `security_groups` table in the same database."""
    return Ledger(policies.database, SECURITY_GROUPS.name, patience=PATIENCE)


async def pending(url: str, options: DatabaseOptions) -> list[str]:
    """The steps that the schema lacks, in order. Raises CannotOpen."""
    return await opening.pending(url, options, POLICIES.name, MIGRATIONS, patience=PATIENCE)
