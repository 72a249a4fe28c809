"""Security groups in SQL, changed under a ledger of their own: the `security_groups` table of the bus.

The rules are kept as they were understood, not as the Cloud Controller wrote them, so that what the cells get depends
on the rows alone and not on the version of the server that reads them.
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from databases.core import Connection as DatabaseConnection

from bus.failpoints import failpoint
from bus.ledger import Change, Ledger, Outcome
from bus.log import about
from bus.messages import SecurityGroup
from bus.security_groups import GroupId, security_group_key
from bus.tables import Key
from services.policy.leadership import Fence

log = logging.getLogger(__name__)

SHOWN = 20
"""How many groups a line of the log names."""

_COLUMNS = "guid, name, rules, running_default, staging_default, running_spaces, staging_spaces"
_INSERT = (
    f"INSERT INTO silkbus_security_groups ({_COLUMNS}) VALUES"  # noqa: S608 (our own texts, none from outside)
    " (:guid, :name, :rules, :running_default, :staging_default, :running_spaces, :staging_spaces)"
)


@dataclass(frozen=True, slots=True)
class Difference:
    """What is to be written for the table to be as wanted."""

    put: Mapping[GroupId, SecurityGroup]
    gone: Collection[GroupId]

    def __bool__(self) -> bool:
        return bool(self.put or self.gone)


class SecurityGroups:
    """The security groups. `committed` is told of each change once it is durable, and must not block."""

    def __init__(self, ledger: Ledger, committed: Callable[[Outcome[Difference]], None]) -> None:
        self._ledger = ledger
        self._committed = committed

    async def all(self) -> dict[GroupId, SecurityGroup]:
        """Every group by its GUID. Raises what the database raises."""
        return await self._ledger.read(select)

    async def replace(
        self,
        wanted: Mapping[GroupId, SecurityGroup],
        *,
        actor: str,
        keep: Collection[GroupId] = (),
        fence: Fence | None = None,
    ) -> Difference:
        """Make the table what is wanted, in one change; groups in `keep` stay as they are. What was changed.

        When nothing is to be changed, one statement is read and nothing written. Raises what `fence` raises, or what
        the database raises.
        """
        if not (different := _difference(await self.all(), wanted, keep)):
            return different

        async def work(change: Change) -> Difference:
            if fence is not None:
                await fence(change.database)
            different = _difference(await select(change.database), wanted, keep)
            for guid in [*different.gone, *different.put]:
                await change.database.execute("DELETE FROM silkbus_security_groups WHERE guid = :guid", {"guid": guid})
            for guid in different.gone:
                change.delete(security_group_key(guid))
            for guid, group in different.put.items():
                await change.database.execute(_INSERT, _row(group))
                change.put(security_group_key(guid), group.encode())
            failpoint("policy.groups.before-commit")
            return different

        outcome = await self._ledger.change(work, actor=actor)
        if outcome.changed:
            self._committed(outcome)
        done = outcome.result or different
        log.info(
            "changed security groups",
            extra=about(
                put=len(done.put),
                gone=len(done.gone),
                names=[group.name for group in done.put.values()][:SHOWN],
                removed=list(done.gone)[:SHOWN],
                user=actor,
                revision=outcome.revision,
            ),
        )
        return done


async def select(database: DatabaseConnection) -> dict[GroupId, SecurityGroup]:
    """Every group by its GUID."""
    rows = await database.fetch_all(f"SELECT {_COLUMNS} FROM silkbus_security_groups")  # noqa: S608 (as above)
    return {GroupId(row["guid"]): _group(row) for row in rows}


async def entries(database: DatabaseConnection) -> Mapping[Key, Any]:
    """The whole `security_groups` table of the bus, as it is in SQL: what `bus.tables.Publisher` starts from."""
    return {security_group_key(guid): group.encode() for guid, group in (await select(database)).items()}


def _difference(
    present: Mapping[GroupId, SecurityGroup], wanted: Mapping[GroupId, SecurityGroup], keep: Collection[GroupId]
) -> Difference:
    return Difference(
        {guid: group for guid, group in wanted.items() if present.get(guid) != group},
        [guid for guid in present if guid not in wanted and guid not in keep],
    )


def _row(group: SecurityGroup) -> dict[str, Any]:
    """The group as a row: what is no plain value is JSON."""
    values = group.encode()
    lists = {name: _json(values[name]) for name in ("rules", "running_spaces", "staging_spaces")}
    return {"guid": group.guid, **values, **lists}


def _group(row: Any) -> SecurityGroup:
    lists = {name: json.loads(row[name]) for name in ("rules", "running_spaces", "staging_spaces")}
    flags = {name: bool(row[name]) for name in ("running_default", "staging_default")}
    return SecurityGroup.decode(GroupId(row["guid"]), {"name": row["name"], **flags, **lists})


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
