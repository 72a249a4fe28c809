"""The leases in SQL: which cell has which subnet of the overlay, and the rules by which they are given.

A lease belongs to a cell's name. The cell's underlay address may change (a machine made anew) and the subnet stays, so
its containers' neighbours only learn another way to it. A cell of the original tells no name: it gets one derived from
its address, and when a cell with a name of its own comes from there, that one takes the lease over as it is.

What was released or expired is remembered with its time and its last owner. It rests before another cell may have it,
since others may still send what was meant for that owner; the owner itself may have it back at once. A new cell gets a
subnet that nobody had, else the one that has been free longest.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from databases.core import Connection

from bus.failpoints import failpoint
from bus.ledger import Change, Ledger, Outcome
from bus.log import about
from bus.messages import CellName, Lease, lease_key
from services.silk.pool import Kind, Pool
from services.silk.renewals import Renewals
from services.silk.schema import CLOCK, COLUMNS, LOCK, lease_of
from services.silk.subnets import derived_cell, vtep_mac

log = logging.getLogger(__name__)

REST_SECONDS = 600


class LeaseRefused(Exception):
    """A lease that cannot be given, or not be renewed now. The text says why."""


class Exhausted(LeaseRefused):
    """No subnet of the pool is free."""


class OutsidePool(LeaseRefused):
    """The cell's lease is not of a network that is leased any more."""


class LeaseLost(Exception):
    """The cell does not have that lease: it is another's, or was released."""


@dataclass(frozen=True, slots=True)
class Terms:
    """By what rules leases are given. Times are in seconds."""

    pool: Pool
    expiry: int
    """After which a lease that is not renewed ends."""
    rest: int = REST_SECONDS
    """Before a subnet that was released or expired goes to another cell."""


class LeaseStore:
    """Gives, renews and takes back leases. `committed` is told of each change of the table, once it is committed."""

    def __init__(self, ledger: Ledger, terms: Terms, committed: Callable[[Outcome[Any]], None] | None = None) -> None:
        self.ledger = ledger
        self.terms = terms
        self._committed = committed
        self._renewals = Renewals(ledger, terms.expiry)
        dialect = ledger.database.url.dialect
        self.clock, self.lock = CLOCK[dialect], LOCK[dialect]
        self.ends_at = f"renewed_at + COALESCE(expires_in, {terms.expiry})"

    async def acquire(
        self, cell: CellName, underlay: IPv4Address, kind: Kind = Kind.BLOCK, *, had: IPv4Network | None = None
    ) -> Outcome[Lease]:
        """The cell's lease: the one it has, else a new one; renewed as of now. Raises LeaseRefused.

        `had` is the subnet that the cell was using, which it is given if that is free: the database may be one that
        was restored, and not know of it.
        """

        async def work(change: Change) -> Lease:
            holder = await self._find(change.database, "underlay", underlay)
            own = await self._find(change.database, "cell", cell)
            if holder is not None and holder.cell != cell:
                if holder.cell != derived_cell(underlay):
                    raise LeaseRefused(
                        f"underlay address {underlay} belongs to cell {holder.cell}, which has {holder.subnet}: give"
                        f" cell {cell} its own address, or release that lease if {holder.cell} is no more"
                    )
                if own is None:
                    own = holder
                else:
                    await self.remove(change, holder)
            return await self._grant(change, cell, underlay, kind, own, had)

        return await self._acquire(work, cell)

    async def acquire_at(self, underlay: IPv4Address, kind: Kind = Kind.BLOCK) -> Outcome[Lease]:
        """The lease of the cell at this address, whose name is not told. Raises LeaseRefused."""

        async def work(change: Change) -> Lease:
            own = await self._find(change.database, "underlay", underlay)
            cell = own.cell if own is not None else derived_cell(underlay)
            namesake = None if own is not None else await self._find(change.database, "cell", cell)
            if namesake is not None:
                raise LeaseRefused(
                    f"the cell at {underlay} would be called {cell}, and the one at {namesake.underlay} is: give that"
                    f" another name"
                )
            return await self._grant(change, cell, underlay, kind, own, None)

        return await self._acquire(work, derived_cell(underlay))

    async def renew(self, lease: Lease, *, adopt: bool = False) -> None:
        """Note that the cell still has this very lease. Raises LeaseLost, or OutsidePool.

        One that expired, and that nobody else got, is the cell's again. With `adopt` also one that was released, or
        was never heard of: what the original does, whose cells renew before anything else.
        """
        if self.terms.pool.kind_of(lease.subnet) is None:
            if adopt or await self._holds(lease):
                raise OutsidePool(
                    f"cell {lease.cell}: its subnet {lease.subnet} is none of the pool {self.terms.pool} in blocks of"
                    f" /{self.terms.pool.prefix_length}: drain the cell, so that it gets one of those, or add the"
                    f" network to overlay_network"
                )
            raise _lost(lease)
        if not await self._renewals.renew(lease):
            await self.commit(lambda change: self._reinstate(change, lease, adopt), lease.cell)

    async def renew_at(self, underlay: IPv4Address, subnet: str, mac: str) -> None:
        """As `renew`, for the cell at this address, whose name is not told; adopts. `subnet` as the cell writes it."""
        own = await self.ledger.read(lambda connection: self._find(connection, "underlay", underlay))
        cell = derived_cell(underlay) if own is None else own.cell
        try:
            lease = Lease(IPv4Network(subnet), cell, underlay, mac)
        except ValueError:  # an address within a subnet
            raise LeaseLost(f"cell {cell} has no lease of {subnet}, which is no subnet") from None
        await self.renew(lease, adopt=own is None)

    async def release(self, lease: Lease) -> Outcome[None]:
        """Take back this very lease; one that is not there is no error."""

        async def work(change: Change) -> None:
            if await self._find(change.database, "cell", lease.cell) == lease:
                await self.remove(change, lease)

        return await self.commit(work, lease.cell)

    async def release_where(self, column: str, value: CellName | IPv4Address, actor: str) -> Outcome[Lease | None]:
        """Take back the lease of the cell of that name ("cell") or at that address ("underlay"), if it has one."""

        async def work(change: Change) -> Lease | None:
            lease = await self._find(change.database, column, value)
            if lease is not None:
                await self.remove(change, lease)
            return lease

        return await self.commit(work, actor)

    async def put(self, change: Change, lease: Lease, renewed_at: int | None = None) -> None:
        """Write down a lease, inside a change: its subnet, cell and address have none. `renewed_at`: now, if None."""
        values: dict[str, Any] = {**lease.encode(), "cell": str(lease.cell)}
        await change.database.execute("DELETE FROM former_leases WHERE subnet = :subnet", {"subnet": values["subnet"]})
        renewed, expires_in = (self.clock, self.terms.expiry) if renewed_at is None else (int(renewed_at), "NULL")
        await change.database.execute(
            "INSERT INTO leases (subnet, cell, underlay, mac, acquired_at, renewed_at, expires_in)"  # noqa: S608
            f" VALUES (:subnet, :cell, :underlay, :mac, {self.clock}, {renewed}, {expires_in})",
            values,
        )
        change.put(lease_key(lease.subnet), lease.encode())
        change.event("lease.acquired", lease_key(lease.subnet), lease.encode())

    async def entries(self, connection: Connection) -> Mapping[tuple[str, ...], Any]:
        """The `leases` table: subnet -> lease."""
        rows = await connection.fetch_all(f"SELECT {COLUMNS} FROM leases")  # noqa: S608
        leases = [lease_of(row) for row in rows]
        return {lease_key(lease.subnet): lease.encode() for lease in leases}

    async def all(self) -> list[Lease]:
        """All leases that nobody has ended, by subnet: what the bus has, too."""
        query = f"SELECT {COLUMNS} FROM leases"  # noqa: S608
        rows = await self.ledger.read(lambda connection: connection.fetch_all(query))
        return sorted(map(lease_of, rows), key=lambda lease: lease.subnet)

    async def _acquire(self, work: Callable[[Change], Any], actor: str) -> Outcome[Lease]:
        outcome: Outcome[Lease] = await self.commit(work, actor)
        if outcome.result is None:  # only for a request id that is not new, and ours always are
            raise LeaseRefused("the database gave no lease: ask again")
        if not outcome.changed and not await self._renewals.renew(outcome.result):
            raise LeaseRefused(f"the lease of {outcome.result.subnet} was released meanwhile: ask again")
        return outcome

    async def commit(self, work: Callable[[Change], Any], actor: str) -> Outcome[Any]:
        """Make a change of the leases, and tell who is to be told of it."""

        async def written(change: Change) -> Any:
            result = await work(change)
            failpoint("silk.lease.before-commit")
            return result

        outcome = await self.ledger.change(written, actor=actor)
        if outcome.changed:
            failpoint("silk.lease.after-commit")
            if self._committed is not None:
                self._committed(outcome)
        return outcome

    async def _grant(
        self,
        change: Change,
        cell: CellName,
        underlay: IPv4Address,
        kind: Kind,
        own: Lease | None,
        had: IPv4Network | None,
    ) -> Lease:
        """`own`, if it is as it should be; else changed, or a new one in its place."""
        if own is not None and self.terms.pool.kind_of(own.subnet) is kind:
            lease = Lease(own.subnet, cell, underlay, vtep_mac(own.subnet))
            if lease == own:
                return own
            await self.remove(change, own, told=False)
        else:
            if own is not None:
                await self.remove(change, own)
            subnet = await self._free(change.database, {cell, derived_cell(underlay)}, kind, had)
            lease = Lease(subnet, cell, underlay, vtep_mac(subnet))
        await self.put(change, lease)
        return lease

    async def _free(
        self, connection: Connection, names: Collection[CellName], kind: Kind, had: IPv4Network | None
    ) -> IPv4Network:
        """A subnet that this cell may have: what it had, else one nobody had, else the one free longest.

        `names`: its own, and that derived from its address, under which it had one as a cell of the original.
        """
        pool = self.terms.pool
        leased = await connection.fetch_all("SELECT subnet FROM leases")
        taken = pool.covered(kind, (row["subnet"] for row in leased))
        former = await connection.fetch_all(
            f"SELECT subnet, cell, released_at + {self.terms.rest} - {self.clock} AS rest FROM former_leases"  # noqa: S608
            " ORDER BY released_at, subnet"
        )
        rested: list[int] = []
        resting: dict[int, int] = {}
        for row in former:
            bases = pool.covered(kind, [row["subnet"]]) - taken
            if row["cell"] in names and bases:
                own = IPv4Network(row["subnet"])
                if pool.kind_of(own) is kind:
                    return own
            if row["rest"] > 0:
                resting |= dict.fromkeys(bases, row["rest"])
            else:
                rested += sorted(bases)
        known = resting.keys() | rested
        if had is not None and pool.kind_of(had) is kind:
            base = int(had.network_address)
            if base not in taken and base not in resting:
                return had
        for base in pool.bases(kind):
            if base not in taken and base not in known:
                return pool.subnet(kind, base)
        for base in rested:
            if base not in resting:
                return pool.subnet(kind, base)
        raise _exhausted(pool, kind, len(taken), resting)

    async def _reinstate(self, change: Change, lease: Lease, adopt: bool) -> None:
        """Give a cell back the lease that it renews and does not have. Raises LeaseLost if it may not have it."""
        if await self._find(change.database, "cell", lease.cell) == lease:
            return  # another controller was quicker
        pool, subnet = self.terms.pool, lease.subnet
        kind = pool.kind_of(subnet)
        rows = await change.database.fetch_all("SELECT subnet, cell, underlay FROM leases")
        if (
            kind is None
            or lease.mac != vtep_mac(subnet)
            or any(row["cell"] == lease.cell or row["underlay"] == str(lease.underlay) for row in rows)
            or int(subnet.network_address) in pool.covered(kind, (row["subnet"] for row in rows))
        ):
            raise _lost(lease)
        former = await change.database.fetch_one(
            f"SELECT cell, expired, released_at + {self.terms.rest} <= {self.clock} AS rested FROM former_leases"  # noqa: S608
            " WHERE subnet = :subnet",
            {"subnet": str(subnet)},
        )
        if former is None:
            allowed = adopt
        elif former["cell"] == lease.cell:
            allowed = adopt or bool(former["expired"])
        else:
            allowed = adopt and bool(former["rested"])
        if not allowed:
            raise _lost(lease)
        log.warning("an ended lease is the cell's again", extra=about(subnet=str(subnet), cell=lease.cell))
        await self.put(change, lease)

    async def remove(self, change: Change, lease: Lease, *, told: bool = True, expired: bool = False) -> None:
        """End a lease, inside a change. `told`: it ends for others, too, and is not just replaced by one like it."""
        subnet = {"subnet": str(lease.subnet)}
        await change.database.execute("DELETE FROM leases WHERE subnet = :subnet", subnet)
        await change.database.execute("DELETE FROM former_leases WHERE subnet = :subnet", subnet)
        await change.database.execute(
            "INSERT INTO former_leases (subnet, released_at, cell, expired)"  # noqa: S608
            f" VALUES (:subnet, {self.clock}, :cell, :expired)",
            {**subnet, "cell": str(lease.cell), "expired": int(expired)},
        )
        change.delete(lease_key(lease.subnet))
        if told:
            kind = "lease.expired" if expired else "lease.released"
            change.event(kind, lease_key(lease.subnet), lease.encode())

    async def _holds(self, lease: Lease) -> bool:
        return await self.ledger.read(lambda connection: self._find(connection, "subnet", lease.subnet)) == lease

    async def _find(
        self, connection: Connection, column: str, value: CellName | IPv4Address | IPv4Network
    ) -> Lease | None:
        query = f"SELECT {COLUMNS} FROM leases WHERE {column} = :value"  # noqa: S608 (our own column names)
        row = await connection.fetch_one(query, {"value": str(value)})
        return None if row is None else lease_of(row)


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"cell {lease.cell} has no lease of {lease.subnet} at {lease.underlay} any more")


def _exhausted(pool: Pool, kind: Kind, taken: int, resting: Mapping[int, int]) -> Exhausted:
    what = f"subnet /{pool.prefix_length}" if kind is Kind.BLOCK else "single address"
    wait = f", the next for {min(resting.values())} s more" if resting else ""
    return Exhausted(
        f"no {what} of {pool} is free: of {pool.size(kind)} {taken} are leased and {len(resting)} rest{wait}: add a"
        f" network to overlay_network, or release the leases of cells that are no more (`silkbus silk release`)"
    )
