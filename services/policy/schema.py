"""The SQL tables of policies, tags and security groups, and the steps that make them.

Their names begin with `silkbus_`, so that they can lie in the database of Cloud Foundry's policy server, whose tables
are called `policies`, `security_groups` and the like (contract/policy.md 4.1): taking over (`takeover`) changes nothing
of the original's, which can be gone back to.

A policy's row is found from both ends: by (source, destination) for changes, by destination for lists and for "is this
app still in any policy". `id` keeps the order of insertion, which is the order of lists. A tag's row stays when it is
freed: `app` is then its last owner, if that is known, and `freed_at` tells since when it rests. `changed_apps` finds
the changes of an app in the change log, for the history. The columns' limits are those of contract/policy.md 1.4 and
1.9. Names are compared byte for byte on all databases, hence the collation for MySQL; only blanks at the end mean
nothing to it, and names that end with one are refused at the door.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.schema import CreateIndex

from bus.ledger import CHANGE_LOG, Step
from bus.messages import MAX_APP_ID

_EXACT: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
_LONG_TEXT = Text().with_variant(MEDIUMTEXT(), "mysql")

metadata = MetaData()

policies = Table(
    "silkbus_policies",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("source", String(MAX_APP_ID), nullable=False),
    Column("destination", String(MAX_APP_ID), nullable=False),
    Column("protocol", String(3), nullable=False),
    Column("start_port", Integer, nullable=False),
    Column("end_port", Integer, nullable=False),
    UniqueConstraint("source", "destination", "protocol", "start_port", "end_port", name="silkbus_policies_unique"),
    **_EXACT,
)

tags = Table(
    "silkbus_tags",
    metadata,
    Column("tag", Integer, primary_key=True, autoincrement=False),
    Column("app", String(MAX_APP_ID), nullable=True, unique=True),
    Column("type", String(MAX_APP_ID), nullable=False, server_default="app"),  # or "router", from the original
    Column("freed_at", BigInteger, nullable=True),  # Unix time in seconds; NULL while in use
    **_EXACT,
)

changed_apps = Table(
    "silkbus_changed_apps",
    metadata,
    Column("app", String(MAX_APP_ID), primary_key=True),
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    **_EXACT,
)

security_groups = Table(
    "silkbus_security_groups",
    metadata,
    Column("guid", String(MAX_APP_ID), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("rules", _LONG_TEXT, nullable=False),  # JSON, as are the spaces: a list of rules, lists of GUIDs
    Column("staging_default", Boolean, nullable=False),
    Column("running_default", Boolean, nullable=False),
    Column("staging_spaces", _LONG_TEXT, nullable=False),
    Column("running_spaces", _LONG_TEXT, nullable=False),
    **_EXACT,
)

leader = Table(
    "silkbus_leader",
    metadata,
    Column("duty", String(64), primary_key=True),
    Column("holder", String(32), nullable=False),
    Column("term", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),  # by the database's clock
    **_EXACT,
)

MIGRATIONS: Sequence[Step] = (
    (
        "policy-1",
        (
            policies,
            CreateIndex(Index("silkbus_policies_destination", policies.c.destination)),
            tags,
            CreateIndex(Index("silkbus_tags_freed_at", tags.c.freed_at)),
            changed_apps,
            CreateIndex(Index("change_log_actor", CHANGE_LOG.c.table_name, CHANGE_LOG.c.actor, CHANGE_LOG.c.revision)),
            CreateIndex(Index("change_log_time", CHANGE_LOG.c.table_name, CHANGE_LOG.c.changed_at_ms)),
        ),
    ),
    ("policy-2", (security_groups,)),
    (
        "policy-3",
        (leader, "INSERT INTO silkbus_leader (duty, holder, term, expires_at_ms) VALUES ('upkeep', '', 0, 0)"),
    ),
)
