"""Policies and tags in SQL, changed under the ledger so that one revision carries both.

A change is a whole request in one transaction: it may run several times (the ledger retries), so it keeps nothing
between runs. What goes to the cells is decided here: the key (destination, source) with all its remaining ports, and
the tag of each app that is in any policy. The number of statements grows with the request's length in chunks only.
"""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from databases.core import Connection as DatabaseConnection

from bus.failpoints import failpoint
from bus.ledger import Change, Ledger, Outcome
from bus.log import about
from bus.messages import AppId, Policy, Ports, Protocol, Revision, Tag, policy_key, tag_key
from bus.tables import Key
from services.policy import rows
from services.policy.leadership import Fence
from services.policy.rows import APPS, chunks
from services.policy.tag_pool import TagPool

log = logging.getLogger(__name__)

Pair = tuple[AppId, AppId]
"""Source and destination."""

_POLICY: rows.Columns = (
    ("source", str),
    ("destination", str),
    ("protocol", str),
    ("start_port", int),
    ("end_port", int),
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


class OtherType(Exception):
    """The group has a tag of another type. The text says which."""


class Store:
    """The policies. `committed` is told of each change once it is durable, and must not block."""

    def __init__(self, ledger: Ledger, tag_pool: TagPool, committed: Callable[[Outcome[Any]], None]) -> None:
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

    async def delete(
        self,
        unwanted: Iterable[Policy],
        *,
        actor: str,
        request_id: str | None = None,
        fence: Fence | None = None,
    ) -> Revision:
        """Remove the policies that are there, all or none; the revision that lacks them.

        Raises what `fence` raises, or what the database raises.
        """
        requested = list(dict.fromkeys(unwanted))

        async def work(change: Change) -> None:
            if fence is not None:
                await fence(change.database)
            await self._delete(change, requested)

        return await self._change("deleted-policies", work, requested, actor, request_id)

    async def list(self, wanted: Filter) -> list[Policy]:
        """The policies that match, in the order in which they were added."""

        async def read(database: DatabaseConnection) -> list[Policy]:
            return await select(database, wanted)

        return await self._ledger.read(read)

    async def tags(self) -> Sequence[tuple[AppId, Tag, str]]:
        """App, tag and type of the tags in use, ascending."""

        async def read(database: DatabaseConnection) -> Sequence[tuple[AppId, Tag, str]]:
            found = await database.fetch_all(
                "SELECT app, tag, type FROM silkbus_tags WHERE freed_at IS NULL ORDER BY tag"
            )
            return [(AppId(row["app"]), Tag(row["tag"]), row["type"]) for row in found]

        return await self._ledger.read(read)

    async def tag(self, app: AppId, kind: str, *, actor: str) -> Tag:
        """The tag of a group that has one without being in any policy, as the router; given to it if it had none.

        Raises OtherType, TagsExhausted, or what the database raises.
        """

        async def work(change: Change) -> Tag:
            if (known := await _tag(change.database, app, kind)) is not None:
                return known
            taken = (await self._tags.take(change.database, [app]))[app]
            values = {"type": kind, "tag": taken}
            await change.database.execute("UPDATE silkbus_tags SET type = :type WHERE tag = :tag", values)
            change.put(tag_key(app), taken)
            await _note(change, [app])
            return taken

        async def read(database: DatabaseConnection) -> Tag | None:
            return await _tag(database, app, kind)

        if (known := await self._ledger.read(read)) is not None:
            return known
        outcome = await self._ledger.change(work, actor=actor)
        if outcome.changed:
            self._committed(outcome)
            log.info("gave-tag", extra=about(app=app, type=kind, tag=outcome.result, revision=outcome.revision))
        assert outcome.result is not None  # noqa: S101 (for the type checker: only another's request id has none)
        return outcome.result

    async def check(self) -> None:
        """Raises what the database raises when it does not answer."""
        await self._ledger.database.fetch_val("SELECT 1")

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
        present = await _present(change.database, requested)
        new = [policy for policy in requested if policy not in present]
        if not new:
            return
        if quota is not None:
            await _check_quota(change.database, new, quota)
        apps = list(dict.fromkeys(app for policy in new for app in (policy.source, policy.destination)))
        for app, tag in (await self._tags.take(change.database, apps)).items():
            change.put(tag_key(app), tag)
        await _insert(change.database, new)
        await _note(change, apps)
        ports = _by_pair([*present, *new])
        await _put(change, _by_pair(new), ports)
        await _tell(change, "policy.added", new)
        failpoint("policy.before-commit")

    async def _delete(self, change: Change, requested: Sequence[Policy]) -> None:
        present = await _present(change.database, requested)
        gone = [policy for policy in requested if policy in present]
        if not gone:
            return
        ids = (present[policy] for policy in gone)
        await rows.execute_in(change.database, "DELETE FROM silkbus_policies WHERE id IN ({numbers})", ids)
        removed = set(gone)
        await _put(change, _by_pair(gone), _by_pair(policy for policy in present if policy not in removed))
        apps = list(dict.fromkeys(app for policy in gone for app in (policy.source, policy.destination)))
        await _note(change, apps)
        used = await _used(change.database, apps)
        for app in await self._tags.free(change.database, [app for app in apps if app not in used]):
            change.delete(tag_key(app))
        await _tell(change, "policy.removed", gone)
        failpoint("policy.before-commit")


async def entries(database: DatabaseConnection) -> Mapping[Key, Any]:
    """The whole `policies` table of the bus, as it is in SQL: what `bus.tables.Publisher` starts from."""
    found: dict[Key, Any] = {}
    for (source, destination), ports in _by_pair(await select(database, Filter())).items():
        found[policy_key(destination, source)] = [item.encode() for item in sorted(ports)]
    for row in await database.fetch_all("SELECT app, tag FROM silkbus_tags WHERE freed_at IS NULL"):
        found[tag_key(AppId(row["app"]))] = row["tag"]
    return found


async def select(database: DatabaseConnection, wanted: Filter) -> list[Policy]:
    """The policies that match, in the order in which they were added."""
    of_sources = "SELECT p.* FROM {rows} {then} silkbus_policies p ON p.source = item.app"
    of_destinations = "SELECT p.* FROM {rows} {then} silkbus_policies p ON p.destination = item.app"
    found: list[Any] = []
    if wanted.either is None and wanted.sources is None and wanted.destinations is None:
        found = await _all(database)
    else:
        for apps, queries in (
            (wanted.either, (of_sources, of_destinations)),
            (wanted.sources, (of_sources,)),
            (wanted.destinations, (of_destinations,)),
        ):
            if apps is not None:
                for query in queries:
                    found += await rows.select(database, query, APPS, ((app,) for app in set(apps)))
                break
    by_id: dict[int, Policy] = {}
    for chunk in chunks(found, 1000):
        by_id.update((row["id"], policy) for row in chunk if wanted.matches(policy := _policy(row)))
        await asyncio.sleep(0)  # long lists are not made at one go
    return [by_id[number] for number in sorted(by_id)]


async def _all(database: DatabaseConnection) -> list[Any]:
    """All rows, a part at a time: the drivers do nothing else while they unpack an answer."""
    found: list[Any] = []
    query = "SELECT * FROM silkbus_policies WHERE id > :last ORDER BY id LIMIT 2000"
    while part := await database.fetch_all(query, {"last": found[-1]["id"] if found else 0}):
        found += part
    return found


async def _present(database: DatabaseConnection, requested: Iterable[Policy]) -> dict[Policy, int]:
    """Every policy between the pairs of the requested ones, with its row's id."""
    query = (
        "SELECT p.* FROM {rows} {then} silkbus_policies p"
        " ON p.source = item.source AND p.destination = item.destination"
    )
    found = await rows.select(database, query, (("source", str), ("destination", str)), _by_pair(requested))
    present: dict[Policy, int] = {}
    for chunk in chunks(found):
        present.update((_policy(row), row["id"]) for row in chunk)
        await asyncio.sleep(0)
    return present


async def _insert(database: DatabaseConnection, new: Iterable[Policy]) -> None:
    query = (
        "INSERT INTO silkbus_policies (source, destination, protocol, start_port, end_port)"
        " SELECT source, destination, protocol, start_port, end_port FROM {rows} ORDER BY position"
    )
    items = ((number, *_row(policy)) for number, policy in enumerate(new))
    await rows.execute(database, query, (("position", int), *_POLICY), items)


async def _note(change: Change, apps: Iterable[AppId]) -> None:
    """Note that the change concerns these apps, for the history."""
    query = "INSERT INTO silkbus_changed_apps ({columns}) SELECT {columns} FROM {rows}"
    items = ((app, int(change.revision)) for app in apps)
    await rows.execute(change.database, query, (("app", str), ("revision", int)), items)


async def _put(change: Change, pairs: Iterable[Pair], ports: Mapping[Pair, Collection[Ports]]) -> None:
    """Say which ports these pairs now have, if any."""
    for chunk in chunks(pairs):
        for source, destination in chunk:
            key = policy_key(destination, source)
            if remaining := ports.get((source, destination)):
                change.put(key, [item.encode() for item in sorted(remaining)])
            else:
                change.delete(key)
        await asyncio.sleep(0)


async def _tell(change: Change, kind: str, policies: Iterable[Policy]) -> None:
    for chunk in chunks(policies):
        for policy in chunk:
            change.event(kind, policy_key(policy.destination, policy.source), _event(policy))
        await asyncio.sleep(0)


async def _check_quota(database: DatabaseConnection, new: Iterable[Policy], quota: int) -> None:
    """Raises QuotaExceeded. Exact because it is asked under the head's lock: nobody else adds policies meanwhile."""
    added = Counter(policy.source for policy in new)
    query = (
        "SELECT p.source, COUNT(*) AS present FROM {rows} {then} silkbus_policies p"
        " ON p.source = item.app GROUP BY p.source"
    )
    found = await rows.select(database, query, APPS, ((source,) for source in added))
    present = {AppId(row["source"]): int(row["present"]) for row in found}
    for source in added:
        if present.get(source, 0) + added[source] > quota:
            raise QuotaExceeded(f"{source} would have {present.get(source, 0) + added[source]} of {quota} policies")


async def _tag(database: DatabaseConnection, app: AppId, kind: str) -> Tag | None:
    """The tag that the group has with this type, None if it has none. Raises OtherType."""
    row = await database.fetch_one(
        "SELECT tag, type FROM silkbus_tags WHERE app = :app AND freed_at IS NULL", {"app": app}
    )
    if row is None:
        return None
    if row["type"] != kind:
        raise OtherType(f"group {app!r} has a tag of type {row['type']!r}, not {kind!r}")
    return Tag(row["tag"])


async def _used(database: DatabaseConnection, apps: Iterable[AppId]) -> set[AppId]:
    """Which of these apps are an end of some policy."""
    query = (
        "SELECT app FROM {rows} WHERE EXISTS (SELECT 1 FROM silkbus_policies p WHERE p.source = item.app)"
        " OR EXISTS (SELECT 1 FROM silkbus_policies p WHERE p.destination = item.app)"
    )
    return {AppId(row["app"]) for row in await rows.select(database, query, APPS, ((app,) for app in apps))}


def _by_pair(items: Iterable[Policy]) -> dict[Pair, list[Ports]]:
    pairs = defaultdict(list)
    for policy in items:
        pairs[policy.source, policy.destination].append(policy.ports)
    return pairs


def _row(policy: Policy) -> tuple[str | int, ...]:
    return policy.source, policy.destination, policy.ports.protocol.value, policy.ports.start, policy.ports.end


def _policy(row: Any) -> Policy:
    ports = Ports(Protocol(row["protocol"]), row["start_port"], row["end_port"])
    return Policy(AppId(row["source"]), AppId(row["destination"]), ports)


def _event(policy: Policy) -> dict[str, Any]:
    return {"source": policy.source, "destination": policy.destination, "ports": policy.ports.encode()}
