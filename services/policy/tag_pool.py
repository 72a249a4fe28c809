"""Giving tags to apps and taking them back, inside the ledger's transactions.

A tag travels in packets and means an app. A cell that has been cut off goes on with its last state for up to
`max_stale` seconds, so a freed tag rests longer than that before it may mean another app; the one app it may be given
back to at once is its last owner, for whom it means what it always meant. Numbers never used come first, ascending,
then freed ones, the one that rested longest first.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import sqlalchemy as sql
from databases.core import Connection as DatabaseConnection

from bus.messages import MAX_TAG, AppId, Tag
from services.policy.schema import tags

CHUNK = 500
"""How many values one statement carries: well below SQLite's and PostgreSQL's limits of 32 766 bound values."""
REST_MARGIN = 3600
"""Seconds a freed tag rests beyond `max_stale`, for clocks that do not agree."""

T = TypeVar("T")


class TagsExhausted(Exception):
    """Every tag is in use or resting."""


def chunks(items: Iterable[T], size: int = CHUNK) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


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
        for chunk in chunks(apps):
            query = sql.select(tags.c.app, tags.c.tag, tags.c.freed_at).where(tags.c.app.in_(chunk))
            for row in await database.fetch_all(query):
                known.add(row["app"])
                if row["freed_at"] is not None:
                    resting[row["app"]] = Tag(row["tag"])
        for returned in chunks(resting):
            await database.execute(tags.update().where(tags.c.app.in_(returned)).values(freed_at=None))
        missing = [app for app in apps if app not in known]
        numbers = await self._free_numbers(database, len(missing)) if missing else []
        given = dict(zip(missing, numbers, strict=True))
        for pairs in chunks(given.items()):
            rows = [{"tag": tag, "app": app, "freed_at": None} for app, tag in pairs]
            await database.execute(tags.insert().values(rows))
        return {app: tag for app in apps if (tag := given.get(app) or resting.get(app)) is not None}

    async def free(self, database: DatabaseConnection, apps: Iterable[AppId]) -> None:
        """Take the tags of these apps back, to rest from now on."""
        now = math.ceil(self._clock())
        for chunk in chunks(apps):
            await database.execute(tags.update().where(tags.c.app.in_(chunk)).values(freed_at=now))

    async def _free_numbers(self, database: DatabaseConnection, count: int) -> list[Tag]:
        """Tags that no row holds any more, in the order in which they are to be given."""
        used = await database.fetch_val(sql.select(sql.func.coalesce(sql.func.max(tags.c.tag), 0)))
        numbers = [Tag(number) for number in range(used + 1, min(used + count, self.highest) + 1)]
        wanted = count - len(numbers)
        if wanted == 0:
            return numbers
        rested = int(self._clock()) - self.rest
        query = sql.select(tags.c.tag).where(tags.c.freed_at <= rested).order_by(tags.c.freed_at, tags.c.tag)
        old = [Tag(row["tag"]) for row in await database.fetch_all(query.limit(wanted))]
        if len(old) < wanted:
            raise TagsExhausted(
                f"no free tags: {count} needed, {len(numbers) + len(old)} free; at most {self.highest} apps can be in "
                f"policies, and a freed tag rests for {self.rest} s before another app may have it"
            )
        for chunk in chunks(old):
            await database.execute(tags.delete().where(tags.c.tag.in_(chunk)))
        return numbers + old
