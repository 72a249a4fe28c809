"""Opening a service's database with its schema brought up to date, and saying so that people understand why not.

Every server migrates when it starts, and a command does it ahead of them; all at once, if need be. Steps only ever add,
so servers of the version before go on while one of the next has already migrated; but a server is not started on a
schema newer than itself, unless the operator says that it is to go back (`database_newer_schema`).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from databases import DatabaseURL

from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.decode import Malformed
from bus.ledger import Ledger, SchemaTooNew, Step


class CannotOpen(Exception):
    """The database cannot be used. The text says which, and why."""


@asynccontextmanager
async def open_ledgers(
    url: str, options: DatabaseOptions, tables: Sequence[str], steps: Sequence[Step], *, patience: float, migrate: bool
) -> AsyncIterator[list[Ledger]]:
    """The ledgers of these tables in the database at `url`; with `migrate`, its schema up to date. Raises CannotOpen.

    `patience` is for how many seconds a change or reading is tried again while the database is away.
    """
    async with AsyncExitStack() as stack:
        try:
            database = await stack.enter_async_context(open_database(url, options))
            ledgers = [Ledger(database, table, patience=patience) for table in tables]
            for ledger in ledgers if migrate else ():
                await ledger.migrate(steps, newer=options.newer_schema)
        except Exception as error:
            raise CannotOpen(f"database {DatabaseURL(url).obscure_password}: {reason(error)}") from error
        yield ledgers


async def pending(
    url: str, options: DatabaseOptions, table: str, steps: Sequence[Step], *, patience: float
) -> list[str]:
    """The steps that the schema lacks, in order. Raises CannotOpen."""
    async with open_ledgers(url, options, [table], steps, patience=patience, migrate=False) as (ledger,):
        try:
            return await ledger.pending(steps)
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
