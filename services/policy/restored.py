"""What must follow when the database was restored from a dump, before servers start on it: no tag may change meaning.

A cell that is cut off goes on for up to `max_stale` with what it last heard, which may be of the time between the dump
and the restoring. Tags given out in that time are unknown to the dump, and would be given again, to other apps: the
cut-off cell would let the wrong app through. The same goes for tags that rested in the dump: one may have been given to
another app since. So all of them rest, from now on, and belong to nobody, not even their last owner:

- those that rested in the dump;
- of the numbers that were never used, as many as may have been given out since. New ones are given in ascending order,
  so it is the lowest that were. How many is not known: half of all, unless told.

Tags that were in use then are kept. One of them can only have been given to another app if it was freed after the dump
and rested to the end, so only if the dump is older than a rest: then there is a warning.

This is a change like any other, so it is in the history, and the time of the last change, by which foreign agents see
whether to read anew, is later than all they have seen (contract/policy.md 2).
"""

import time
from dataclasses import dataclass

from databases.core import Connection

from bus.ledger import Change, Ledger
from bus.messages import MAX_TAG, AppId, Revision, Tag, tag_key
from services.policy import rows

ACTOR = "silkbus policy restored"


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done: tags now resting that rested before, and that were never used in the dump; what can be given out.

    `last_change_ms` is the Unix time of the dump's last change, 0 if it has none; the dump is not older.
    """

    revision: Revision
    rested: int
    reserved: int
    left: int
    last_change_ms: int


async def restored(ledger: Ledger, *, given: int | None = None) -> Restored:
    """Let the tags rest that may have had another meaning since the dump. `given`: how many new ones were, at most.

    Must be called once after each restoring, with no server running. Raises what the database raises.
    """
    last_change_ms = await ledger.last_changed()

    async def work(change: Change) -> tuple[int, int, int]:
        database, now = change.database, int(time.time())
        resting = int(await database.fetch_val("SELECT COUNT(*) FROM silkbus_tags WHERE freed_at IS NOT NULL"))
        again = "UPDATE silkbus_tags SET freed_at = :now, app = NULL WHERE freed_at IS NOT NULL"
        await database.execute(again, {"now": now})
        highest = int(await database.fetch_val("SELECT COALESCE(MAX(tag), 0) FROM silkbus_tags"))
        unused = MAX_TAG - highest
        reserved = min(unused, (unused + 1) // 2 if given is None else given)
        numbers = range(highest + 1, highest + reserved + 1)
        query = "INSERT INTO silkbus_tags (tag, type, freed_at) SELECT tag, type, freed_at FROM {rows}"
        columns = (("tag", int), ("type", str), ("freed_at", int))
        await rows.execute(database, query, columns, ((number, "app", now) for number in numbers))
        await _say_something(change)
        return resting, reserved, unused - reserved

    outcome = await ledger.change(work, actor=ACTOR)
    assert outcome.result is not None  # noqa: S101 (for the type checker: only another's request id has none)
    rested, reserved, left = outcome.result
    return Restored(outcome.revision, rested, reserved, left, last_change_ms)


async def _say_something(change: Change) -> None:
    """See that this is a change, though no entry of the table becomes another: say again what is so."""
    if (known := await _some_tag(change.database)) is not None:
        app, tag = known
        change.put(tag_key(app), tag)
    else:
        change.delete(tag_key(AppId("nobody")))


async def _some_tag(database: Connection) -> tuple[AppId, Tag] | None:
    row = await database.fetch_one("SELECT app, tag FROM silkbus_tags WHERE freed_at IS NULL ORDER BY tag LIMIT 1")
    return None if row is None else (AppId(row["app"]), Tag(row["tag"]))
