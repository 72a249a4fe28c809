"""The policy server's database: opened, with its schema brought up to date.

Every server migrates when it starts, and `silkbus policy migrate` does it ahead of them; all at once, if need be.
Steps only ever add, so servers of the version before go on while one of the next has already migrated; but a server is
not started on a schema newer than itself.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from databases import DatabaseURL

from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.decode import Malformed
from bus.ledger import Ledger, SchemaTooNew
from bus.tables import POLICIES, SECURITY_GROUPS
from services.policy.schema import MIGRATIONS

PATIENCE = 5.0
"""Seconds for which a request is tried again while the database is away: clients should hear of it soon."""


class CannotOpen(Exception):
    """The database cannot be used. The text says which, and why."""


@asynccontextmanager
async def open_ledger(url: str, options: DatabaseOptions, *, migrate: bool = True) -> AsyncIterator[Ledger]:
    """The ledger of the `policies` table in the database at `url`, its schema up to date unless told otherwise.

    Raises CannotOpen.
    """
    async with AsyncExitStack() as stack:
        try:
            database = await stack.enter_async_context(open_database(url, options))
            ledger = Ledger(database, POLICIES.name, patience=PATIENCE)
            if migrate:
                await ledger.migrate(MIGRATIONS)
                await security_groups_ledger(ledger).migrate(MIGRATIONS)
        except Exception as error:
            raise CannotOpen(f"database {DatabaseURL(url).obscure_password}: {reason(error)}") from error
        yield ledger


def security_groups_ledger(policies: Ledger) -> Ledger:
    """The ledger of the `security_groups` table in the same database."""
    return Ledger(policies.database, SECURITY_GROUPS.name, patience=PATIENCE)


async def pending(url: str, options: DatabaseOptions) -> list[str]:
    """The steps that the schema lacks, in order. Raises CannotOpen."""
    async with open_ledger(url, options, migrate=False) as ledger:
        try:
            return await ledger.pending(MIGRATIONS)
        except Exception as error:
            raise CannotOpen(f"database {DatabaseURL(url).obscure_password}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What to tell people of an error of the database."""
    if isinstance(error, (SchemaTooNew, Malformed)):
        return str(error)
    if isinstance(error, asyncio.TimeoutError) and not str(error):
        return "does not answer"
    cause = error.__cause__ or error.__context__  # MySQL's driver says "can't connect" and keeps the reason there
    return f"{error!r}: {cause}" if cause is not None and str(cause) not in repr(error) else repr(error)
