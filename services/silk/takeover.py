"""Taking over the leases of the original's controller, so that every cell keeps its subnet.

Cells are called by their underlay address, `ip-10-0-0-5`, until one comes over the bus from there with a name of its
own. Nothing is changed in the original's table, so it can be gone back to. It can be repeated: a lease that is there
already is left as it is, one that another cell has meanwhile, or whose cell has another, is left out and named.

A controller that starts with an empty table in the original's own database does it by itself: without, it would lease
subnets that cells of the original have. The original's controllers must have been stopped; its cells may go on.
"""

import logging
from dataclasses import dataclass
from ipaddress import IPv4Network

from databases import DatabaseURL

from bus.database import open_database, transaction
from bus.database_options import DatabaseOptions
from bus.ledger import Change, Ledger
from bus.log import about
from bus.messages import Lease
from bus.opening import reason
from services.silk import original_table
from services.silk.leases import LeaseStore, Terms
from services.silk.original_table import Found
from services.silk.schema import COLUMNS, lease_of

log = logging.getLogger(__name__)

ACTOR = "silkbus silk import"


class CannotTakeOver(Exception):
    """The original's leases cannot be read. The text says where, and why."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it: the leases added, how many were there already, and what was left out, with the reasons."""

    added: list[Lease]
    present: int
    left_out: list[str]


async def take_over(ledger: Ledger, source: str, terms: Terms, options: DatabaseOptions) -> Report:
    """Take over what the original's table in the database at the URL `source` holds. Raises CannotTakeOver."""
    name = DatabaseURL(source).obscure_password
    try:
        async with open_database(source, options) as database, transaction(database, write=False) as connection:
            dialect = database.url.dialect
            if not await original_table.is_there(connection, dialect):
                raise CannotTakeOver(f"database {name}: has no table subnets as the original's controller makes it")
            found = await original_table.read(connection, dialect, terms)
    except CannotTakeOver:
        raise
    except Exception as error:
        raise CannotTakeOver(f"database {name}: {reason(error)}") from error
    return await _add(ledger, terms, found)


async def take_over_at_start(ledger: Ledger, terms: Terms) -> None:
    """Do so if our table is new and the original's lies in the same database. Raises what the database raises."""
    _, revision = await ledger.head()
    if revision:
        return
    dialect = ledger.database.url.dialect
    async with transaction(ledger.database, write=False) as connection:
        if not await original_table.is_there(connection, dialect):
            return
        found = await original_table.read(connection, dialect, terms)
    report = await _add(ledger, terms, found)
    fields = about(leases=len(report.added), left_out=report.left_out)
    log.info("the leases of the original's controller are taken over", extra=fields)


async def _add(ledger: Ledger, terms: Terms, found: Found) -> Report:
    """Add the leases in one change: all or none."""
    store = LeaseStore(ledger, terms)

    async def work(change: Change) -> Report:
        rows = await change.database.fetch_all(f"SELECT {COLUMNS} FROM leases")  # noqa: S608
        held = [lease_of(row) for row in rows]
        subnets = {lease.subnet: lease for lease in held}
        owners = {lease.underlay: lease for lease in held}
        cells = {lease.cell for lease in held}
        report = Report([], 0, list(found.left_out))
        present = 0
        for lease, renewed_at in found.leases.items():
            what = f"{lease.subnet} of {lease.underlay}"
            own = owners.get(lease.underlay)
            if own is not None and own.subnet == lease.subnet:
                present += 1
            elif own is not None:
                report.left_out.append(f"{what}: that cell, {own.cell}, has {own.subnet} here")
            elif (other := _overlapping(lease.subnet, subnets)) is not None:
                report.left_out.append(f"{what}: {other.cell} has {other.subnet} here")
            elif lease.cell in cells:
                report.left_out.append(f"{what}: a cell {lease.cell} has a lease at another address here")
            else:
                await store.put(change, lease, renewed_at)
                report.added.append(lease)
        return Report(report.added, present, report.left_out)

    outcome = await ledger.change(work, actor=ACTOR)
    assert outcome.result is not None  # noqa: S101 (our request ids are new)
    return outcome.result


def _overlapping(subnet: IPv4Network, held: dict[IPv4Network, Lease]) -> Lease | None:
    if subnet in held:
        return held[subnet]
    return next((lease for other, lease in held.items() if other.overlaps(subnet)), None)
