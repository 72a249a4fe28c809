"""Taking over the database of Cloud Foundry's own policy server: tags unchanged, policies, security groups.

The source is only read. The target may be the same database, since our tables have names of their own, or another one.
It must be new, or hold nothing but an earlier taking over of the same: what is there already is skipped, so one that
was cut short is completed by doing it again, and what was changed since is never undone. In the end both sides are
compared.

Policies go the way of every other: in changes of the ledger, a few thousand at a time, since MySQL takes only so much
at once. Running servers publish them as they come.
"""

import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from databases import DatabaseURL
from databases.core import Connection

from bus.database_options import DatabaseOptions
from bus.ledger import Change, Ledger
from bus.messages import AppId, Policy, SecurityGroup, Tag, tag_key
from bus.security_groups import GroupId
from bus.tables import POLICIES, SECURITY_GROUPS
from services.policy import rows, security_groups
from services.policy.migrate import reason, security_groups_ledger
from services.policy.original import Original, Unusable, gaps, read
from services.policy.security_groups import SecurityGroups
from services.policy.store import Filter, Store, select
from services.policy.tag_pool import TagPool, add

ACTOR = "silkbus policy import"
AT_ONCE = 2000
"""Tags or policies of one change."""


class Refused(Exception):
    """It was not taken over. The text says why."""


@dataclass(frozen=True, slots=True)
class Report:
    """How many are there now, how many of them were not before, and what was left out."""

    tags: int
    new_tags: int
    policies: int
    new_policies: int
    security_groups: int
    new_security_groups: int
    left_out: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Held:
    """What our database holds."""

    tags: Mapping[AppId, tuple[Tag, str]]
    policies: Sequence[Policy]
    security_groups: Mapping[GroupId, SecurityGroup]
    used: bool
    """Whether anybody else has changed policies."""
    synced: bool
    """Whether the security groups already are the Cloud Controller's, by our servers."""


async def take_over(ledger: Ledger, source: str, options: DatabaseOptions) -> Report:
    """Take over what the original's database at the URL `source` holds. Raises Refused."""
    try:
        original = await read(source, options)
    except Unusable as error:
        raise Refused(f"{DatabaseURL(source).obscure_password}:\n{error}") from None
    except Exception as error:
        raise Refused(f"{DatabaseURL(source).obscure_password}: {reason(error)}") from error
    before = await ledger.read(_held)
    _refuse_other(before, original)
    await _add_tags(ledger, {app: tag for app, tag in original.tags.items() if app not in before.tags}, original)
    there = set(before.policies)
    new = [policy for policy in original.policies if policy not in there]
    store = Store(ledger, TagPool(rest=0, clock=time.time), lambda _: None)
    for chunk in rows.chunks(new, AT_ONCE):
        await store.create(chunk, actor=ACTOR)
    new_groups = await _add_security_groups(ledger, before, original)
    _compare(await ledger.read(_held), original)
    return Report(
        tags=len(original.tags),
        new_tags=len(original.tags) - len(before.tags),
        policies=len(original.policies),
        new_policies=len(new),
        security_groups=len(original.security_groups),
        new_security_groups=new_groups,
        left_out=original.left_out,
    )


async def _held(database: Connection) -> _Held:
    tags = await database.fetch_all("SELECT app, tag, type FROM silkbus_tags WHERE freed_at IS NULL")
    others = "SELECT 1 FROM change_log WHERE table_name = :table AND actor <> :actor LIMIT 1"

    async def changed(table: str) -> bool:
        return await database.fetch_val(others, {"table": table, "actor": ACTOR}) is not None

    return _Held(
        tags={AppId(row["app"]): (Tag(row["tag"]), row["type"]) for row in tags},
        policies=await select(database, Filter()),
        security_groups=await security_groups.select(database),
        used=await changed(POLICIES.name),
        synced=await changed(SECURITY_GROUPS.name),
    )


def _refuse_other(held: _Held, original: Original) -> None:
    """Raises Refused when our database holds anything that this would overwrite or mix with."""
    if held.used:
        raise Refused("our database has already been changed through the API: take over into a new one")
    other = [f"tag {tag} of {app}" for app, (tag, kind) in held.tags.items() if original.tags.get(app) != (tag, kind)]
    there = set(original.policies)
    other += [f"policy {_say(policy)}" for policy in held.policies if policy not in there]
    other += [
        f"security group {guid}"
        for guid, group in held.security_groups.items()
        if not held.synced and original.security_groups.get(guid) != group
    ]
    if other:
        raise Refused(
            f"our database holds what the original's does not: {', '.join(other[:3])}"
            f"{f' and {len(other) - 3} more' if len(other) > 3 else ''}: take over into a new one"
        )


async def _add_tags(ledger: Ledger, new: Mapping[AppId, tuple[Tag, str]], original: Original) -> None:
    now = int(time.time())

    async def resting(change: Change) -> None:
        """Tags freed by the original may still mean their last owners to some cell."""
        present = {row["tag"] for row in await change.database.fetch_all("SELECT tag FROM silkbus_tags")}
        free = [tag for tag in gaps(tag for tag, _ in original.tags.values()) if tag not in present]
        query = "INSERT INTO silkbus_tags ({columns}) SELECT {columns} FROM {rows}"
        await rows.execute(change.database, query, (("tag", int), ("freed_at", int)), ((tag, now) for tag in free))

    for number, chunk in enumerate(rows.chunks(new.items(), AT_ONCE)):

        async def work(change: Change, chunk: Any = chunk, first: bool = number == 0) -> None:
            if first:
                await resting(change)
            await add(change.database, ((tag, app, kind) for app, (tag, kind) in chunk))
            for app, (tag, _) in chunk:
                change.put(tag_key(app), tag)

        await ledger.change(work, actor=ACTOR)


async def _add_security_groups(ledger: Ledger, held: _Held, original: Original) -> int:
    """Add those that are missing; how many. What our servers got from the Cloud Controller is newer."""
    if held.synced:
        return 0
    groups = SecurityGroups(security_groups_ledger(ledger), lambda _: None)
    added = await groups.replace(original.security_groups, actor=ACTOR)
    return len(added.put)


def _compare(held: _Held, original: Original) -> None:
    """Raises Refused unless our database holds just what the original's does."""
    counts: list[tuple[str, Sized, Sized]] = [
        ("tags", held.tags, original.tags),
        ("policies", set(held.policies), set(original.policies)),
    ]
    if not held.synced:
        counts.append(("security groups", held.security_groups, original.security_groups))
    wrong = [f"{len(ours)} {what}, not {len(theirs)}" for what, ours, theirs in counts if ours != theirs]
    if wrong:
        raise Refused(f"our database differs from the original's: {'; '.join(wrong)}: do it again on a new one")


def _say(policy: Policy) -> str:
    ports = policy.ports
    return f"{policy.source} to {policy.destination} {ports.protocol.value} {ports.start}-{ports.end}"
