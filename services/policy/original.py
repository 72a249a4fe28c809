"""What the database of Cloud Foundry's own policy server holds, read without changing it (contract/policy.md 4.1).

A tag is the id of a row of `groups`; rows without a guid are free. A policy is a source group and a row of
`destinations`, which has a group, too. Foreign keys are not everywhere in force, so there may be rows whose other half
is gone; and its older API let ports beyond 65535 in. Such policies never allowed anything: they are left out and named.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from databases.core import Connection

from bus.database import open_database, transaction
from bus.database_options import DatabaseOptions
from bus.decode import Malformed
from bus.messages import MAX_APP_ID, MAX_TAG, AppId, Policy, Ports, Protocol, SecurityGroup, Tag
from bus.security_groups import GroupId, SpaceId
from services.policy.asg_rules import parse_rules
from services.policy.tag_pool import APP

SHOWN = 20
"""How many problems are told at once."""
_NEEDED = {
    "groups": {"id", "guid", "type"},
    "destinations": {"id", "group_id", "port", "protocol", "start_port", "end_port"},
    "policies": {"id", "group_id", "destination_id"},
}
_SECURITY_GROUPS = "security_groups"


class Unusable(Exception):
    """It cannot be taken over. The text has a line for each thing that is wrong."""


@dataclass(slots=True)
class Original:
    """Its content. `tags` has number and type of each group in use; `left_out` says what is, and why."""

    tags: dict[AppId, tuple[Tag, str]] = field(default_factory=dict)
    policies: list[Policy] = field(default_factory=list)
    security_groups: dict[GroupId, SecurityGroup] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


async def read(url: str, options: DatabaseOptions) -> Original:
    """The content of the original's database at `url`. Raises Unusable, or what the database raises."""
    async with open_database(url, options) as database, transaction(database, write=False) as connection:
        kind = database.url.dialect
        if kind == "sqlite":
            raise Unusable("the original's database is PostgreSQL or MySQL: give its URL with --from")
        columns = await _columns(connection, kind)
        for table, needed in _NEEDED.items():
            if missing := needed - columns.get(table, set()):
                raise Unusable(
                    f"not the database of a policy server of 1.4 or later: {table} has no {', '.join(sorted(missing))}"
                )
        found, problems = Original(), list[str]()
        groups = "`groups`" if kind == "mysql" else '"groups"'  # a reserved word of MySQL 8
        await _read_tags(connection, groups, found, problems)
        await _read_policies(connection, groups, found, problems)
        if _SECURITY_GROUPS in columns:
            await _read_security_groups(connection, found, problems)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise Unusable("\n".join([*problems[:SHOWN], *more]))
    return found


async def _columns(connection: Connection, kind: str) -> Mapping[str, set[str]]:
    """The columns of each table there."""
    here = "DATABASE()" if kind == "mysql" else "current_schema()"
    query = "SELECT table_name AS of_table, column_name AS name FROM information_schema.columns WHERE table_schema = "
    columns: dict[str, set[str]] = {}
    for row in await connection.fetch_all(query + here):
        columns.setdefault(row["of_table"], set()).add(row["name"])
    return columns


async def _read_tags(connection: Connection, groups: str, found: Original, problems: list[str]) -> None:
    query = "SELECT id, guid, type FROM GROUPS WHERE guid IS NOT NULL ORDER BY id".replace("GROUPS", groups)
    for row in await connection.fetch_all(query):
        number, guid = row["id"], row["guid"]
        if not 1 <= number <= MAX_TAG:
            problems.append(
                f"group {guid!r} has tag {number}, and VXLAN carries tags of 1 to {MAX_TAG} only (tag_length 3 never "
                f"worked on the wire): delete its policies in the original and create them anew, for a lower tag"
            )
        elif problem := _wrong_id(guid):
            problems.append(f"group {number}: guid {guid!r} {problem}")
        else:
            found.tags[AppId(guid)] = Tag(number), row["type"] or APP


async def _read_policies(connection: Connection, groups: str, found: Original, problems: list[str]) -> None:
    query = (
        "SELECT p.id, s.guid AS source, g.guid AS destination, d.id AS destination_id, d.protocol,"
        " COALESCE(d.start_port, d.port) AS start_port, COALESCE(d.end_port, d.port) AS end_port FROM policies p"
        " LEFT JOIN GROUPS s ON s.id = p.group_id LEFT JOIN destinations d ON d.id = p.destination_id"
        " LEFT JOIN GROUPS g ON g.id = d.group_id ORDER BY p.id"
    ).replace("GROUPS", groups)
    seen: set[Policy] = set()
    for row in await connection.fetch_all(query):
        what = f"policy {row['id']}"
        if row["destination_id"] is None:
            found.left_out.append(f"{what}: its row of destinations is gone")
        elif row["source"] is None or row["destination"] is None:
            found.left_out.append(f"{what}: its {'source' if row['source'] is None else 'destination'} group is free")
        elif row["protocol"] not in tuple(Protocol):
            problems.append(f"{what}: protocol {row['protocol']!r} is neither tcp nor udp")
        elif _wrong_id(row["source"]) or _wrong_id(row["destination"]):
            pass  # told of the group
        else:
            try:
                ports = Ports(Protocol(row["protocol"]), row["start_port"] or 0, row["end_port"] or 0)
            except Malformed as error:
                found.left_out.append(f"{what}, {row['source']} to {row['destination']}: {error}")
                continue
            policy = Policy(AppId(row["source"]), AppId(row["destination"]), ports)
            if policy not in seen:
                seen.add(policy)
                found.policies.append(policy)


async def _read_security_groups(connection: Connection, found: Original, problems: list[str]) -> None:
    for row in await connection.fetch_all("SELECT * FROM security_groups ORDER BY id"):
        guid, name = GroupId(row["guid"]), row["name"]
        try:
            rules, bad = parse_rules(_json_list(row, "rules"))
            staging, running = (_spaces(row, name) for name in ("staging_spaces", "running_spaces"))
        except ValueError as error:
            problems.append(f"security group {guid!r}: {error}")
            continue
        found.left_out += [f"security group {name!r} ({guid}): {problem}" for problem in bad]
        found.security_groups[guid] = SecurityGroup(
            guid, name, rules, bool(row["running_default"]), bool(row["staging_default"]), running, staging
        )


def _spaces(row: Any, name: str) -> frozenset[SpaceId]:
    items = _json_list(row, name)
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{name} holds what is no GUID")
    return frozenset(map(SpaceId, items))


def _json_list(row: Any, name: str) -> list[Any]:
    try:
        value = json.loads(row[name] or "[]")
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"{name} is not a list")
    return value or []


def _wrong_id(guid: str) -> str | None:
    if not 1 <= len(guid) <= MAX_APP_ID:
        return f"must have 1 to {MAX_APP_ID} characters"
    if not guid.isprintable() or guid != guid.strip():
        return "must be printable and not begin or end with a blank"
    return None


def gaps(used: Iterable[Tag]) -> list[Tag]:
    """The tags that are free, below the highest that is used."""
    taken = set(used)
    return [Tag(number) for number in range(1, max(taken, default=0)) if number not in taken]
