"""Who changed which policies when, and which there were at a revision: read from the change log.

The log's events name each policy added and removed, in order, so both directions of time are in it. A list of the past
is made from the present one, by undoing the changes since: what a question costs depends on how far back it goes, and
that has a limit. `changed_apps` says which changes concern an app; user and time have indexes of the log itself.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from databases.core import Connection

from bus.decode import Fields
from bus.ledger import Ledger, decode_logged
from bus.messages import AppId, Policy, Ports, Revision
from services.policy.store import Filter, select

MAX_POLICIES = 10_000
"""A page ends with the change with which it has this many policies, if its limit does not end it before."""
MAX_CHANGES_BACK = 10_000
MAX_POLICIES_BACK = 500_000
_AT_ONCE = 50
ADDED = "policy.added"
"""The kind of event that tells of a new policy; the other kind tells of one removed."""

_ALL = "SELECT l.* FROM change_log l WHERE l.table_name = 'policies'"
_OF_APP = (
    "SELECT l.* FROM silkbus_changed_apps c JOIN change_log l ON l.revision = c.revision"
    " WHERE l.table_name = 'policies' AND c.app = :app"
)


class TooFarBack(Exception):
    """The list at a revision would take too long to make. The text says how far back one can look."""


class NoSuchRevision(Exception):
    """A revision that has not come yet, or is older than the change log. The text says which there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which changes: each of these that is given must hold. Revisions are exclusive, times (Unix, in ms) inclusive."""

    limit: int = 100
    before: int | None = None
    after: int | None = None
    app: str | None = None
    user: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One change. Of `added` and `removed` only what concerns the app that was asked for."""

    revision: Revision
    at_ms: int
    user: str
    request_id: str
    added: Sequence[Policy]
    removed: Sequence[Policy]


class History:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def page(self, wanted: Wanted) -> tuple[list[Entry], Revision | None]:
        """Changes, the latest first; and the `before` of the next page, or None when there are no more."""

        async def read(database: Connection) -> tuple[list[Entry], Revision | None]:
            return await _page(database, wanted)

        return await self.ledger.read(read)

    async def policies_at(self, revision: int) -> list[Policy]:
        """The policies that there were at a revision. Raises NoSuchRevision, TooFarBack, or as the database."""

        async def read(database: Connection) -> list[Policy]:
            return await _policies_at(database, revision)

        return await self.ledger.read(read)


async def _page(database: Connection, wanted: Wanted) -> tuple[list[Entry], Revision | None]:
    entries: list[Entry] = []
    policies = 0
    rest = wanted
    while True:
        # In small steps: nobody knows how much is in a change before it is read.
        found = await _log(database, replace(rest, limit=min(_AT_ONCE, wanted.limit + 1 - len(entries))))
        for row in found:
            if len(entries) == wanted.limit or (entries and policies >= MAX_POLICIES):
                return entries, entries[-1].revision
            entries.append(await entry_of(row, wanted.app))
            policies += len(entries[-1].added) + len(entries[-1].removed)
        if len(found) < _AT_ONCE:
            return entries, None
        rest = replace(rest, before=entries[-1].revision)


async def _log(database: Connection, wanted: Wanted) -> Sequence[Any]:
    query, values = _ALL, dict[str, Any]()
    if wanted.app is not None:
        query = _OF_APP
        values["app"] = wanted.app
    for name, value, condition in (
        ("before", wanted.before, " AND l.revision < :before"),
        ("after", wanted.after, " AND l.revision > :after"),
        ("user", wanted.user, " AND l.actor = :user"),
        ("since", wanted.since_ms, " AND l.changed_at_ms >= :since"),
        ("until", wanted.until_ms, " AND l.changed_at_ms <= :until"),
    ):
        if value is not None:
            query += condition
            values[name] = value
    query += " ORDER BY l.revision DESC LIMIT :limit"
    found: Sequence[Any] = await database.fetch_all(query, {**values, "limit": wanted.limit})
    return found


async def entry_of(row: Any, app: str | None) -> Entry:
    """What a row of the change log says; of an app alone, if one is given."""
    added: list[Policy] = []
    removed: list[Policy] = []
    for number, event in enumerate(decode_logged(row["events"])):
        policy = event_policy(event)
        if app is None or app in (policy.source, policy.destination):
            (added if event["kind"] == ADDED else removed).append(policy)
        if number % 1000 == 999:
            await asyncio.sleep(0)
    return Entry(Revision(row["revision"]), row["changed_at_ms"], row["actor"], row["request_id"], added, removed)


async def _policies_at(database: Connection, revision: int) -> list[Policy]:
    head = await database.fetch_val("SELECT revision FROM table_head WHERE name = 'policies'")
    first = await database.fetch_val("SELECT MIN(revision) FROM change_log WHERE table_name = 'policies'")
    if revision > head:
        raise NoSuchRevision(f"revision {revision} is not there yet: the latest is {head}")
    if revision < head and (first is None or revision < first - 1):
        begins = "is empty" if first is None else f"begins with {first}"
        raise NoSuchRevision(f"revision {revision} is no longer known: the change log {begins}")
    if head - revision > MAX_CHANGES_BACK:
        raise TooFarBack(
            f"revision {revision} is {head - revision} changes back, and at most {MAX_CHANGES_BACK} can be undone: "
            f"ask for revision {head - MAX_CHANGES_BACK} or later, or read the history"
        )
    policies = dict.fromkeys(await select(database, Filter()))
    undone, before = 0, head + 1
    while before > revision + 1:
        for row in await _log(database, Wanted(before=before, after=revision, limit=_AT_ONCE)):
            before = row["revision"]
            entry = await entry_of(row, None)
            undone += len(entry.added) + len(entry.removed)
            if undone > MAX_POLICIES_BACK:
                raise TooFarBack(
                    f"since revision {revision} more than {MAX_POLICIES_BACK} policies have been added and removed: "
                    f"ask for revision {before} or later, or read the history"
                )
            for policy in entry.added:
                policies.pop(policy, None)
            policies.update(dict.fromkeys(entry.removed))
    return list(policies)


def event_policy(event: Any) -> Policy:
    """The policy that an event of the change log is about."""
    data = Fields(event["data"], "change log")
    return Policy(AppId(data.text("source")), AppId(data.text("destination")), Ports.decode(list(data.items("ports"))))
