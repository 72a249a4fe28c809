"""Why one app may, or may not, open connections to another: by the policies now, and by the change log.

The log is searched backwards from now, among the changes that concern both apps, and only so far: an answer about a
pair that is changed all day long says then that it does not know since when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from databases.core import Connection

from bus.ledger import Ledger
from bus.messages import AppId, Policy, Protocol, Revision, Tag
from services.policy import rows
from services.policy.history import Entry, entry_of
from services.policy.store import Filter, select

MAX_CHANGES = 500
"""How many changes that concern both apps are searched."""
MAX_BYTES = 4 << 20
"""How much of the change log is read at most: one change may be of many thousand policies."""
MAX_REMOVED = 10
_AT_ONCE = 10

_OF_BOTH = (
    "SELECT l.revision, l.request_id, l.actor, l.changed_at_ms, l.events"
    " FROM silkbus_changed_apps a JOIN silkbus_changed_apps b ON b.revision = a.revision"
    " JOIN change_log l ON l.revision = a.revision WHERE a.app = :source AND b.app = :destination"
    " AND l.table_name = 'policies' AND l.revision < :before ORDER BY l.revision DESC LIMIT :limit"
)
_TAGS = "SELECT t.app, t.tag FROM {rows} {then} silkbus_tags t ON t.app = item.app WHERE t.freed_at IS NULL"


@dataclass(frozen=True, slots=True)
class Flow:
    """What is asked about: connections of one app's instances to a port of another's."""

    source: AppId
    destination: AppId
    protocol: Protocol
    port: int

    def allowed_by(self, policy: Policy) -> bool:
        """Whether this policy, which is between the two, allows it."""
        return policy.ports.protocol == self.protocol and policy.ports.start <= self.port <= policy.ports.end


@dataclass(frozen=True, slots=True)
class Known:
    """A policy, and the change that added it (or took it away); None when that is not known any more."""

    policy: Policy
    change: Entry | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """`allowing` are the policies that allow the flow, `others` those between the two that do not.

    `removed` are policies that would allow it, and that are there no more, the latest first; looked for only when it is
    not allowed. `tags` has those apps that have one: who is in no policy has none.
    """

    revision: Revision
    allowing: Sequence[Known]
    others: Sequence[Known]
    removed: Sequence[Known]
    tags: Mapping[AppId, Tag]


async def explain(ledger: Ledger, flow: Flow) -> Explanation:
    """What there is to say about a flow, at one moment. Raises what the database raises."""

    async def read(database: Connection) -> Explanation:
        return await _explain(database, flow)

    return await ledger.read(read)


async def _explain(database: Connection, flow: Flow) -> Explanation:
    revision = Revision(await database.fetch_val("SELECT revision FROM table_head WHERE name = 'policies'"))
    present = await select(database, Filter(sources={flow.source}, destinations={flow.destination}))
    allowing = [policy for policy in present if flow.allowed_by(policy)]
    apps = {flow.source, flow.destination}
    tags = {
        AppId(row["app"]): Tag(row["tag"])
        for row in await rows.select(database, _TAGS, rows.APPS, ((app,) for app in apps))
    }
    added, removed = await _search(database, flow, present, 0 if allowing else MAX_REMOVED)
    return Explanation(
        revision,
        [Known(policy, added.get(policy)) for policy in allowing],
        [Known(policy, added.get(policy)) for policy in present if not flow.allowed_by(policy)],
        removed,
        tags,
    )


async def _search(
    database: Connection, flow: Flow, present: Sequence[Policy], most: int
) -> tuple[Mapping[Policy, Entry], Sequence[Known]]:
    """Which changes added these policies, and which ones took away others that would allow the flow, at most so many.

    A policy is met first where it was changed last.
    """
    sought, added = set(present), dict[Policy, Entry]()
    removed: dict[Policy, Entry] = {}
    before, searched, size = 2**62, 0, 0
    while (len(added) < len(sought) or len(removed) < most) and searched < MAX_CHANGES and size < MAX_BYTES:
        values: dict[str, Any] = {"source": flow.source, "destination": flow.destination}
        found = await database.fetch_all(_OF_BOTH, {**values, "before": before, "limit": _AT_ONCE})
        for row in found:
            entry = await entry_of(row, flow.source)
            before = entry.revision
            size += len(row["events"])
            for policy in entry.added:
                if policy in sought:
                    added.setdefault(policy, entry)
            for policy in entry.removed:
                between = (policy.source, policy.destination) == (flow.source, flow.destination)
                if between and policy not in sought and flow.allowed_by(policy) and len(removed) < most:
                    removed.setdefault(policy, entry)
        searched += len(found)
        if len(found) < _AT_ONCE:
            break
    return added, [Known(policy, entry) for policy, entry in removed.items()]
