"""The SQL tables of policies and tags, and the steps that make them.

A policy's row is found from both ends: by (source, destination) for changes, by destination for lists and for "is this
app still in any policy". `id` keeps the order of insertion, which is the order of lists. A tag's row stays when it is
freed: `app` is then its last owner, and `freed_at` tells since when it rests. The columns' limits are those of
contract/policy.md 1.4 and 1.9. Names are compared byte for byte on all databases, hence the collation for MySQL; only
blanks at the end mean nothing to it, and names that end with one are refused at the door.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, String, Table, UniqueConstraint
from sqlalchemy.schema import CreateIndex

from bus.ledger import Step
from bus.messages import MAX_APP_ID

_EXACT: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}

metadata = MetaData()

policies = Table(
    "policies",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("source", String(MAX_APP_ID), nullable=False),
    Column("destination", String(MAX_APP_ID), nullable=False),
    Column("protocol", String(3), nullable=False),
    Column("start_port", Integer, nullable=False),
    Column("end_port", Integer, nullable=False),
    UniqueConstraint("source", "destination", "protocol", "start_port", "end_port", name="policies_unique"),
    **_EXACT,
)

tags = Table(
    "tags",
    metadata,
    Column("tag", Integer, primary_key=True, autoincrement=False),
    Column("app", String(MAX_APP_ID), nullable=False, unique=True),
    Column("freed_at", BigInteger, nullable=True),  # Unix time in seconds; NULL while in use
    **_EXACT,
)

policies_destination = Index("policies_destination", policies.c.destination)
tags_freed_at = Index("tags_freed_at", tags.c.freed_at)

MIGRATIONS: Sequence[Step] = (
    ("policy-1", (policies, CreateIndex(policies_destination), tags, CreateIndex(tags_freed_at))),
)
