"""Giving tags to apps and taking them back, inside the ledger's transactions.

A tag travels in packets and means an app. A cell that has been cut off goes on with its last state for up to
`max_stale` seconds, so a freed tag rests longer than that before it may mean another app; the one app it may be given
back to at once is its last owner, for whom it means what it always meant. Numbers never used come first, ascending,
then freed ones, the one that rested longest first.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from databases.core import Connection as DatabaseConnection

from bus.messages import MAX_TAG, AppId, Tag
from services.policy import rows

REST_MARGIN = 3600
"""Seconds a freed tag rests beyond `max_stale`, for clocks that do not agree."""

APP = "app"
"""The type of a tag that belongs to an app."""


class TagsExhausted(Exception):
    """Every tag is in use or resting."""


class TagPool:
    """The tags 1 to `highest`.

    `rest` is how long a freed one is kept from other apps, in seconds; `clock` gives Unix time.
    """

    def __init__(self, *, rest: int, clock: Callable[[], float], highest: int = MAX_TAG) -> None:
        self.rest = rest
        self.highest = highest
        self._clock = clock

    async def take(self, database: DatabaseConnection, apps: Collection[AppId]) -> dict[AppId, Tag]:
        """See that each of these apps has a tag; gives back those that had none. Raises TagsExhausted."""
        known: set[AppId] = set()
        resting: dict[AppId, Tag] = {}
        for row in await _of(database, apps):
            known.add(row["app"])
            if row["freed_at"] is not None:
                resting[row["app"]] = Tag(row["tag"])
        returned = "UPDATE silkbus_tags SET freed_at = NULL WHERE tag IN ({numbers})"
        await rows.execute_in(database, returned, resting.values())
        missing = [app for app in apps if app not in known]
        given = dict(zip(missing, await self._free_numbers(database, len(missing)), strict=True)) if missing else {}
        await add(database, ((tag, app, APP) for app, tag in given.items()))
        return {app: tag for app in apps if (tag := given.get(app) or resting.get(app)) is not None}

    async def free(self, database: DatabaseConnection, apps: Iterable[AppId]) -> list[AppId]:
        """Take the tags of these apps back, to rest from now on; the apps whose tags were taken.

        A tag of another type than app stays: its owner has it without being in any policy.
        """
        found = [row for row in await _of(database, apps) if row["type"] == APP]
        freed = "UPDATE silkbus_tags SET freed_at = NOW WHERE tag IN ({numbers})"
        freed = freed.replace("NOW", str(math.ceil(self._clock())))
        await rows.execute_in(database, freed, (row["tag"] for row in found))
        return [AppId(row["app"]) for row in found]

    async def _free_numbers(self, database: DatabaseConnection, count: int) -> list[Tag]:
        """Tags that no row holds any more, in the order in which they are to be given."""
        used = await database.fetch_val("SELECT COALESCE(MAX(tag), 0) FROM silkbus_tags")
        free = [Tag(number) for number in range(used + 1, min(used + count, self.highest) + 1)]
        wanted = count - len(free)
        if wanted == 0:
            return free
        query = (
            "SELECT tag FROM silkbus_tags WHERE freed_at <= :rested AND tag <= :highest ORDER BY freed_at, tag"
            " LIMIT :wanted"
        )
        values = {"rested": int(self._clock()) - self.rest, "highest": self.highest, "wanted": wanted}
        old = [Tag(row["tag"]) for row in await database.fetch_all(query, values)]
        if len(old) < wanted:
            raise TagsExhausted(
                f"no free tags: {count} needed, {len(free) + len(old)} free; at most {self.highest} apps can be in "
                f"policies, and a freed tag rests for {self.rest} s before another app may have it"
            )
        await rows.execute_in(database, "DELETE FROM silkbus_tags WHERE tag IN ({numbers})", old)
        return free + old


async def add(database: DatabaseConnection, given: Iterable[tuple[Tag, AppId, str]]) -> None:
    """Write down tags that are nobody's yet, their owners and types."""
    query = "INSERT INTO silkbus_tags ({columns}) SELECT {columns} FROM {rows}"
    await rows.execute(database, query, (("tag", int), ("app", str), ("type", str)), given)


async def _of(database: DatabaseConnection, apps: Iterable[AppId]) -> Sequence[Any]:
    """The rows of these apps."""
    query = "SELECT t.app, t.tag, t.type, t.freed_at FROM {rows} {then} silkbus_tags t ON t.app = item.app"
    return await rows.select(database, query, rows.APPS, ((app,) for app in apps))
