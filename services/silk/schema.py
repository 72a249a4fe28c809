"""The SQL tables of the leases, the steps that make them, and the database's clock.

A lease belongs to a cell's name; a subnet, a cell and an underlay address have one lease each, whoever writes. A row of
`former_leases` remembers whose a subnet was last, since when it is free, and whether it was given back or expired. The
names differ from the original's one table, `subnets` (contract/cell.md 4.4), so both can lie in one database.

Times are whole seconds of the database's clock, so that several controllers agree. `expires_in` is what the cell was
last told: it counts by that, so a shorter `lease_expiry` holds for it only from its next renewal on. It is NULL where
no cell was told anything yet: leases of an earlier version, or taken over.
"""

from ipaddress import IPv4Address, IPv4Network
from typing import Any

from databases.interfaces import Record
from sqlalchemy import BigInteger, Column, MetaData, String, Table

from bus.ledger import Step
from bus.messages import Lease, cell_name

_EXACT: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
"""MySQL takes "cell-A" and "cell-a" for the same unless told otherwise."""

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
    **_EXACT,
)
_FORMER_LEASES = Table(
    "former_leases",
    _metadata,
    Column("subnet", String(18), primary_key=True),
    Column("released_at", BigInteger, nullable=False),
    **_EXACT,
)
MIGRATIONS: list[Step] = [
    ("lease-1", [_LEASES, _FORMER_LEASES]),
    (
        "lease-2",
        [
            "ALTER TABLE former_leases ADD COLUMN cell VARCHAR(63)",
            "ALTER TABLE former_leases ADD COLUMN expired SMALLINT DEFAULT 0 NOT NULL",
        ],
    ),
    ("lease-3", ["ALTER TABLE leases ADD COLUMN expires_in BIGINT"]),
]

CLOCK = {
    "sqlite": "unixepoch()",
    "postgresql": "CAST(FLOOR(EXTRACT(EPOCH FROM clock_timestamp())) AS BIGINT)",
    "mysql": "CAST(UNIX_TIMESTAMP() AS SIGNED)",
}
LOCK = {"sqlite": "", "postgresql": " FOR UPDATE", "mysql": " FOR UPDATE"}
"""What a SELECT ends with that keeps its rows until the transaction ends; SQLite has one writer at a time anyway."""
COLUMNS = "subnet, cell, underlay, mac"


def lease_of(row: Record) -> Lease:
    """The lease in a row of `COLUMNS`."""
    return Lease(IPv4Network(row["subnet"]), cell_name(row["cell"]), IPv4Address(row["underlay"]), row["mac"])
