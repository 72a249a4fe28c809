"""Policies and tags in SQL, changed under the ledger so that one revision carries both.

A change is a whole request in one transaction: it may run several times (the ledger retries), so it keeps nothing
between runs. What goes to the cells is decided here: the key (destination, source) with all its remaining ports, and
the tag of each app that is in any policy. The number of statements grows with the request's length in chunks only.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from databases.core import Connection as DatabaseConnection

from bus.failpoints import failpoint
from bus.ledger import Change, Ledger, Outcome
from bus.log import about
from bus.messages import AppId, Policy, Ports, Protocol, Revision, Tag, policy_key, tag_key
from bus.tables import Key
from services.policy.schema import policies, tags
from services.policy.tag_pool import CHUNK, TagPool, chunks

log = logging.getLogger(__name__)

Pair = tuple[AppId, AppId]
"""Source and destination."""

_COLUMNS = (
    policies.c.id,
    policies.c.source,
    policies.c.destination,
    policies.c.protocol,
    policies.c.start_port,
    policies.c.end_port,
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which policies to list (contract/policy.md 1.8): each of these that is given must hold."""

    either: Collection[str] | None = None
    sources: Collection[str] | None = None
    destinations: Collection[str] | None = None

    def matches(self, policy: Policy) -> bool:
        return (
            (self.either is None or policy.source in self.either or policy.destination in self.either)
            and (self.sources is None or policy.source in self.sources)
            and (self.destinations is None or policy.destination in self.destinations)
        )


class QuotaExceeded(Exception):
    """A source app would have more policies than it may."""


class Store:
    """The policies. `committed` is told of each change once it is durable, and must not block."""

    def __init__(self, ledger: Ledger, tag_pool: TagPool, committed: Callable[[Outcome[None]], None]) -> None:
        self._ledger = ledger
        self._tags = tag_pool
        self._committed = committed

    async def create(
        self, wanted: Iterable[Policy], *, actor: str, request_id: str | None = None, quota: int | None = None
    ) -> Revision:
        """Add the policies that are not there yet, all or none; the revision that has them.

        `quota` is how many policies a source app may have that gets a new one. Raises QuotaExceeded, TagsExhausted, or
        what the database raises.
        """
        requested = list(dict.fromkeys(wanted))

        async def work(change: Change) -> None:
            await self._create(change, requested, quota)

        return await self._change("created-policies", work, requested, actor, request_id)

    async def delete(self, unwanted: Iterable[Policy], *, actor: str, request_id: str | None = None) -> Revision:
        """Remove the policies that are there, all or none; the revision that lacks them. Raises as the database."""
        requested = list(dict.fromkeys(unwanted))

        async def work(change: Change) -> None:
            await self._delete(change, requested)

        return await self._change("deleted-policies", work, requested, actor, request_id)

    async def list(self, wanted: Filter) -> list[Policy]:
        """The policies that match, in the order in which they were added."""
        query = sql.select(*_COLUMNS).order_by(policies.c.id)
        # Long filters are applied here rather than as thousands of bound values.
        if wanted.either is not None and len(wanted.either) <= CHUNK:
            query = query.where(policies.c.source.in_(wanted.either) | policies.c.destination.in_(wanted.either))
        if wanted.sources is not None and len(wanted.sources) <= CHUNK:
            query = query.where(policies.c.source.in_(wanted.sources))
        if wanted.destinations is not None and len(wanted.destinations) <= CHUNK:
            query = query.where(policies.c.destination.in_(wanted.destinations))
        found = (_policy(row) for row in await self._ledger.database.fetch_all(query))
        return [policy for policy in found if wanted.matches(policy)]

    async def tags(self) -> Sequence[tuple[AppId, Tag]]:
        """The tags in use, ascending."""
        query = sql.select(tags.c.app, tags.c.tag).where(tags.c.freed_at.is_(None)).order_by(tags.c.tag)
        return [(AppId(row["app"]), Tag(row["tag"])) for row in await self._ledger.database.fetch_all(query)]

    async def check(self) -> None:
        """Raises what the database raises when it does not answer."""
        await self._ledger.database.fetch_val(sql.select(1))

    async def _change(
        self,
        done: str,
        work: Callable[[Change], Awaitable[None]],
        requested: Sequence[Policy],
        actor: str,
        request_id: str | None,
    ) -> Revision:
        outcome = await self._ledger.change(work, actor=actor, request_id=request_id)
        if outcome.changed:
            failpoint("policy.after-commit")
            self._committed(outcome)
            failpoint("policy.after-publish")
        log.info(done, extra=about(policies=len(requested), user=actor, revision=outcome.revision))
        return outcome.revision

    async def _create(self, change: Change, requested: Sequence[Policy], quota: int | None) -> None:
        present = await _rows(change.database, requested)
        new = [policy for policy in requested if policy not in present]
        if not new:
            return
        if quota is not None:
            await _check_quota(change.database, new, quota)
        apps = list(dict.fromkeys(app for policy in new for app in (policy.source, policy.destination)))
        for app, tag in (await self._tags.take(change.database, apps)).items():
            change.put(tag_key(app), tag)
        for chunk in chunks(new):
            await change.database.execute(policies.insert().values([_row(policy) for policy in chunk]))
        ports = _by_pair([*present, *new])
        for source, destination in _by_pair(new):
            change.put(policy_key(destination, source), [item.encode() for item in sorted(ports[source, destination])])
        for policy in new:
            change.event("policy.added", policy_key(policy.destination, policy.source), _event(policy))
        failpoint("policy.before-commit")

    async def _delete(self, change: Change, requested: Sequence[Policy]) -> None:
        present = await _rows(change.database, requested)
        gone = [policy for policy in requested if policy in present]
        if not gone:
            return
        for chunk in chunks(gone):
            ids = [present[policy] for policy in chunk]
            await change.database.execute(policies.delete().where(policies.c.id.in_(ids)))
        removed = set(gone)
        left = _by_pair(policy for policy in present if policy not in removed)
        for source, destination in _by_pair(gone):
            key = policy_key(destination, source)
            if remaining := left.get((source, destination)):
                change.put(key, [item.encode() for item in sorted(remaining)])
            else:
                change.delete(key)
        apps = list(dict.fromkeys(app for policy in gone for app in (policy.source, policy.destination)))
        used = await _used(change.database, apps)
        unused = [app for app in apps if app not in used]
        await self._tags.free(change.database, unused)
        for app in unused:
            change.delete(tag_key(app))
        for policy in gone:
            change.event("policy.removed", policy_key(policy.destination, policy.source), _event(policy))
        failpoint("policy.before-commit")


async def entries(database: DatabaseConnection) -> Mapping[Key, Any]:
    """The whole `policies` table of the bus, as it is in SQL: what `bus.tables.Publisher` starts from."""
    found: dict[Key, Any] = {}
    for (source, destination), ports in _by_pair(map(_policy, await database.fetch_all(sql.select(*_COLUMNS)))).items():
        found[policy_key(destination, source)] = [item.encode() for item in sorted(ports)]
    for row in await database.fetch_all(sql.select(tags.c.app, tags.c.tag).where(tags.c.freed_at.is_(None))):
        found[tag_key(AppId(row["app"]))] = row["tag"]
    return found


async def _rows(database: DatabaseConnection, requested: Iterable[Policy]) -> dict[Policy, int]:
    """Every policy between the pairs of the requested ones, with its row's id."""
    present = {}
    for chunk in chunks(_by_pair(requested)):
        # Not a comparison of tuples, for which SQLite reads the whole table.
        same = [
            (policies.c.source == source) & (policies.c.destination == destination) for source, destination in chunk
        ]
        query = sql.select(*_COLUMNS).where(sql.or_(*same))
        present.update({_policy(row): row["id"] for row in await database.fetch_all(query)})
    return present


async def _check_quota(database: DatabaseConnection, new: Iterable[Policy], quota: int) -> None:
    """Raises QuotaExceeded. Exact because it is asked under the head's lock: nobody else adds policies meanwhile."""
    added = Counter(policy.source for policy in new)
    for chunk in chunks(added):
        counted = sql.select(policies.c.source, sql.func.count().label("count")).where(policies.c.source.in_(chunk))
        rows = await database.fetch_all(counted.group_by(policies.c.source))
        present = {AppId(row["source"]): int(row["count"]) for row in rows}
        for source in chunk:
            if present.get(source, 0) + added[source] > quota:
                raise QuotaExceeded(f"{source} would have {present.get(source, 0) + added[source]} of {quota} policies")


async def _used(database: DatabaseConnection, apps: Iterable[AppId]) -> set[AppId]:
    """Which of these apps are an end of some policy."""
    used: set[AppId] = set()
    for chunk in chunks(apps):
        for column in (policies.c.source, policies.c.destination):
            rows = await database.fetch_all(sql.select(column).where(column.in_(chunk)).distinct())
            used.update(AppId(row[column.name]) for row in rows)
    return used


def _by_pair(items: Iterable[Policy]) -> dict[Pair, list[Ports]]:
    pairs = defaultdict(list)
    for policy in items:
        pairs[policy.source, policy.destination].append(policy.ports)
    return pairs


def _row(policy: Policy) -> dict[str, Any]:
    return {
        "source": policy.source,
        "destination": policy.destination,
        "protocol": str(policy.ports.protocol),
        "start_port": policy.ports.start,
        "end_port": policy.ports.end,
    }


def _policy(row: Any) -> Policy:
    ports = Ports(Protocol(row["protocol"]), row["start_port"], row["end_port"])
    return Policy(AppId(row["source"]), AppId(row["destination"]), ports)


def _event(policy: Policy) -> dict[str, Any]:
    return {"source": policy.source, "destination": policy.destination, "ports": policy.ports.encode()}
