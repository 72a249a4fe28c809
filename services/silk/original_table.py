"""The original's table of leases, read without changing it (contract/cell.md 4.4).

It may lie in our database, beside our tables, or in another. What it holds need not be valid: its API lets a daemon
renew what it likes. Leases that expired are nobody's: the original lists them no more.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from databases.core import Connection
from databases.interfaces import Record

from bus.messages import Lease
from services.silk.leases import Terms
from services.silk.schema import CLOCK
from services.silk.subnets import derived_cell, vtep_mac

_COLUMNS = {"id", "underlay_ip", "overlay_subnet", "overlay_hwaddr", "last_renewed_at"}


@dataclass(slots=True)
class Found:
    """The leases there with the times of their last renewal, and those left out, with the reasons."""

    leases: dict[Lease, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


async def is_there(connection: Connection, dialect: str) -> bool:
    """Whether this database has the original's table."""
    if dialect == "sqlite":
        rows = await connection.fetch_all("SELECT name FROM pragma_table_info('subnets')")
    else:
        here = "DATABASE()" if dialect == "mysql" else "current_schema()"
        rows = await connection.fetch_all(
            "SELECT column_name AS name FROM information_schema.columns"  # noqa: S608 (our own text)
            f" WHERE table_name = 'subnets' AND table_schema = {here}"
        )
    return {row["name"] for row in rows} >= _COLUMNS


async def read(connection: Connection, dialect: str, terms: Terms) -> Found:
    """The leases that can be taken over under these terms."""
    found = Found()
    now = int(await connection.fetch_val(f"SELECT {CLOCK[dialect]} AS now"))
    rows = await connection.fetch_all("SELECT * FROM subnets ORDER BY last_renewed_at DESC, id")
    taken: list[IPv4Network] = []
    for row in rows:
        what = f"{row['overlay_subnet']} of {row['underlay_ip']}"
        lease = _lease(row)
        if lease is None:
            found.left_out.append(f"{what}: {row['overlay_hwaddr']} is not its MAC, or no lease can be so")
        elif row["last_renewed_at"] + terms.expiry < now:
            found.left_out.append(f"{what}: expired, renewed last {now - row['last_renewed_at']} s ago")
        elif terms.pool.kind_of(lease.subnet) is None:
            found.left_out.append(f"{what}: none of the pool {terms.pool} in blocks of /{terms.pool.prefix_length}")
        elif any(lease.subnet.overlaps(other) for other in taken):
            found.left_out.append(f"{what}: overlaps another that was renewed later")
        else:
            taken.append(lease.subnet)
            found.leases[lease] = min(row["last_renewed_at"], now)
    return found


def _lease(row: Record) -> Lease | None:
    """The lease of a row, None if it can be none."""
    try:
        subnet, underlay = IPv4Network(row["overlay_subnet"]), IPv4Address(row["underlay_ip"])
    except ValueError:
        return None
    if row["overlay_hwaddr"] != vtep_mac(subnet):
        return None
    return Lease(subnet, derived_cell(underlay), underlay, row["overlay_hwaddr"])
