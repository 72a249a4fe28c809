"""The leases in SQL: which cell has which subnet of the overlay.

A lease belongs to a cell's name. The cell's underlay address may change (a machine made anew) and the subnet stays, so
its containers' neighbours only learn another way to it. Times are whole seconds of the database's clock, so that
several controllers agree. A renewal only moves a time: it is no change of the table, has no revision, and reaches
nobody.

What was released is remembered with its time: a new cell gets a subnet that nobody had, else the one free longest,
since other cells may still send what was meant for its former owner.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from databases import Database
from databases.core import Connection
from databases.interfaces import Record
from sqlalchemy import BigInteger, Column, MetaData, String, Table

from bus.ledger import Change, Ledger, Outcome, Step
from bus.log import about
from bus.messages import CellName, Lease, cell_name, lease_key
from services.silk.subnets import subnet_pool, vtep_mac

log = logging.getLogger(__name__)

_metadata = MetaData()
_LEASES = Table(
    "leases",
    _metadata,
    Column("subnet", String(18), primary_key=True),
    Column("cell", String(63), nullable=False, unique=True),
    Column("underlay", String(15), nullable=False, unique=True),
    Column("mac", String(17), nullable=False),
    Column("acquired_at", BigInteger, nullable=False),
    Column("renewed_at", BigInteger, nullable=False),
)
_FORMER_LEASES = Table(
    "former_leases",
    _metadata,
    Column("subnet", String(18), primary_key=True),
    Column("released_at", BigInteger, nullable=False),
)
MIGRATIONS: list[Step] = [("lease-1", [_LEASES, _FORMER_LEASES])]

_CLOCK = {
    "sqlite": "unixepoch()",
    "postgresql": "CAST(EXTRACT(EPOCH FROM now()) AS BIGINT)",
    "mysql": "UNIX_TIMESTAMP()",
}
MAX_SETTLING = 120.0


class LeaseRefused(Exception):
    """A lease that cannot be given. The text says why."""


class LeaseStore:
    """Gives, renews and takes back leases of the subnets of length `prefix_length` in `overlay`.

    `expiry` is in seconds. Only when the pool is exhausted is an expired lease given to another cell, the oldest first,
    and not before this store has been up for so long that every living cell must have renewed: after an outage of the
    controller all leases look old.
    """

    def __init__(self, ledger: Ledger, overlay: IPv4Network, prefix_length: int, expiry: int) -> None:
        self._ledger = ledger
        self._database: Database = ledger.database
        self._overlay = overlay
        self._prefix_length = prefix_length
        self._expiry = expiry
        self._clock = _CLOCK[self._database.url.dialect]
        # Renewals queue here: hundreds at once, as after an outage, would fight for SQLite's one lock and time out.
        self._renewing = asyncio.Lock()
        self._reclaims_from = time.monotonic() + min(MAX_SETTLING, expiry)

    async def acquire(self, cell: CellName, underlay: IPv4Address) -> Outcome[Lease]:
        """The cell's lease: the one it has, else a new one; renewed as of now. Raises LeaseRefused."""

        async def work(change: Change) -> Lease:
            return await self._acquire(change, cell, underlay)

        outcome = await self._ledger.change(work, actor=cell)
        if outcome.result is not None and not outcome.changed and not await self.renew(outcome.result):
            raise LeaseRefused(f"cell {cell}: its lease of {outcome.result.subnet} was released meanwhile: ask again")
        return outcome

    async def renew(self, lease: Lease) -> bool:
        """Note that the cell still has this very lease. False if it has not: it is another's, or released."""
        values = {**lease.encode(), "cell": str(lease.cell)}
        where = "subnet = :subnet AND cell = :cell AND underlay = :underlay AND mac = :mac"
        async with self._renewing, self._database.connection() as connection:
            # Reading afterwards: what drivers answer to an update differs.
            await connection.execute(f"UPDATE leases SET renewed_at = {self._clock} WHERE {where}", values)  # noqa: S608
            return await connection.fetch_one(f"SELECT 1 FROM leases WHERE {where}", values) is not None  # noqa: S608

    async def release(self, lease: Lease) -> Outcome[None]:
        """Take back this very lease; one that is not there is no error."""

        async def work(change: Change) -> None:
            if await self._of(change.database, lease.cell) == lease:
                await self._remove(change, lease)
                change.event("lease.released", lease_key(lease.subnet), lease.encode())

        return await self._ledger.change(work, actor=lease.cell)

    async def entries(self, connection: Connection) -> Mapping[tuple[str, ...], Any]:
        """The `leases` table: subnet -> lease. Expired leases are in it until their subnet is given away."""
        rows = await connection.fetch_all("SELECT subnet, cell, underlay, mac FROM leases")
        leases = [_lease(row) for row in rows]
        return {lease_key(lease.subnet): lease.encode() for lease in leases}

    async def _acquire(self, change: Change, cell: CellName, underlay: IPv4Address) -> Lease:
        holder = await change.database.fetch_one(
            "SELECT subnet, cell FROM leases WHERE underlay = :underlay AND cell <> :cell",
            {"underlay": str(underlay), "cell": cell},
        )
        if holder is not None:
            raise LeaseRefused(
                f"underlay address {underlay} belongs to cell {holder['cell']}, which has {holder['subnet']}:"
                f" give cell {cell} its own address, or release that lease if {holder['cell']} is no more"
            )
        own = await self._of(change.database, cell)
        keep = own is not None and self._in_pool(own.subnet)
        if own is not None and keep and own.underlay == underlay:
            return own
        if own is not None:
            await self._remove(change, own)
            if not keep:
                change.event("lease.released", lease_key(own.subnet), own.encode())
        subnet = own.subnet if own is not None and keep else await self._free(change)
        lease = Lease(subnet, cell, underlay, vtep_mac(subnet))
        await change.database.execute("DELETE FROM former_leases WHERE subnet = :subnet", {"subnet": str(subnet)})
        await change.database.execute(
            "INSERT INTO leases (subnet, cell, underlay, mac, acquired_at, renewed_at)"  # noqa: S608
            f" VALUES (:subnet, :cell, :underlay, :mac, {self._clock}, {self._clock})",
            {**lease.encode(), "cell": str(cell)},
        )
        change.put(lease_key(subnet), lease.encode())
        change.event("lease.acquired", lease_key(lease.subnet), lease.encode())
        return lease

    async def _free(self, change: Change) -> IPv4Network:
        """A subnet nobody leases. Raises LeaseRefused."""
        rows = await change.database.fetch_all("SELECT subnet FROM leases")
        former = await change.database.fetch_all("SELECT subnet FROM former_leases ORDER BY released_at")
        # A lease of another prefix length (the setting was changed) still covers its addresses.
        leased = [IPv4Network(row["subnet"]) for row in rows]
        taken = {part for subnet in leased for part in self._parts(subnet)}
        released = [IPv4Network(row["subnet"]) for row in former]
        known = set(released)
        free = [subnet for subnet in subnet_pool(self._overlay, self._prefix_length) if subnet not in taken]
        fresh = next((subnet for subnet in free if subnet not in known), None)
        if fresh is not None:
            return fresh
        oldest = next((subnet for subnet in released if subnet in set(free)), None)
        return oldest if oldest is not None else await self._reclaim(change)

    async def _reclaim(self, change: Change) -> IPv4Network:
        row = await change.database.fetch_one(
            "SELECT subnet, cell, underlay, mac FROM leases"  # noqa: S608
            f" WHERE renewed_at + {self._expiry} <= {self._clock} ORDER BY renewed_at, subnet LIMIT 1"
        )
        exhausted = (
            f"no subnet /{self._prefix_length} of {self._overlay} is free: release the leases of cells that are no"
            " more, or use a larger network"
        )
        if row is None:
            raise LeaseRefused(exhausted)
        wait = self._reclaims_from - time.monotonic()
        if wait > 0:
            raise LeaseRefused(f"{exhausted}; expired ones are given away only in {wait:.0f} s, after all could renew")
        lease = _lease(row)
        log.warning("an expired lease is given away", extra=about(subnet=str(lease.subnet), cell=lease.cell))
        await self._remove(change, lease)
        change.event("lease.expired", lease_key(lease.subnet), lease.encode())
        return lease.subnet

    async def _remove(self, change: Change, lease: Lease) -> None:
        subnet = {"subnet": str(lease.subnet)}
        await change.database.execute("DELETE FROM leases WHERE subnet = :subnet", subnet)
        await change.database.execute("DELETE FROM former_leases WHERE subnet = :subnet", subnet)
        statement = f"INSERT INTO former_leases (subnet, released_at) VALUES (:subnet, {self._clock})"  # noqa: S608
        await change.database.execute(statement, subnet)
        change.delete(lease_key(lease.subnet))

    async def _of(self, connection: Connection, cell: CellName) -> Lease | None:
        query = "SELECT subnet, cell, underlay, mac FROM leases WHERE cell = :cell"
        row = await connection.fetch_one(query, {"cell": cell})
        return None if row is None else _lease(row)

    def _in_pool(self, subnet: IPv4Network) -> bool:
        first = next(self._overlay.subnets(new_prefix=self._prefix_length))
        return subnet.prefixlen == self._prefix_length and subnet.subnet_of(self._overlay) and subnet != first

    def _parts(self, subnet: IPv4Network) -> list[IPv4Network]:
        """The pool's subnets that share addresses with `subnet`."""
        if subnet.prefixlen >= self._prefix_length:
            return [subnet.supernet(new_prefix=self._prefix_length)]
        return list(subnet.subnets(new_prefix=self._prefix_length))


def _lease(row: Record) -> Lease:
    return Lease(IPv4Network(row["subnet"]), cell_name(row["cell"]), IPv4Address(row["underlay"]), row["mac"])
