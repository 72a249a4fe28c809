"""The Cloud Controller: in which spaces apps lie, and in which a user is a developer. Its API v3 only.

`GET /v3/apps` and `GET /v3/roles` (since CC API 3.77), with the token of our own client, which may read everything; so
what comes back is compared with what was asked for, lest a filter that was not understood give somebody everybody's
spaces.

Answers are remembered for seconds. An app not found or a role not had is asked for again, so that an app pushed or a
role given a moment ago counts at once, while one taken away counts that much later.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar

from bus.decode import Fields
from bus.messages import AppId
from services.policy.access import Space
from services.policy.cc_api import Api
from services.policy.recent import Recent
from services.policy.remote import Remote
from services.policy.rows import chunks
from services.policy.uaa import OwnToken

K = TypeVar("K")
T = TypeVar("T")

CHUNK = 100
"""Apps asked for at once, as the original does: longer addresses are refused on the way."""
MANY = 10 * CHUNK
"""For lists with more apps than these it is cheaper to ask which apps the user's own spaces have."""
AT_ONCE = 4
PER_PAGE = 500
REMEMBERED = 100_000
_GUID = re.compile(r"[0-9A-Za-z_.~-]{1,64}")
"""What an id must look like to be asked for. Commas part the ids in a query, so one in an id would make it two."""


class CloudController:
    """What the Cloud Controller knows, as `services.policy.access.Spaces`. Answers are used for `remember` seconds."""

    def __init__(self, remote: Remote, token: OwnToken, *, remember: float) -> None:
        self._api = Api(remote, token)
        self._apps: Recent[AppId, Space] = Recent(remember, most=REMEMBERED)
        self._roles: Recent[tuple[str, Space], bool] = Recent(remember, most=REMEMBERED)
        self._own: Recent[str, AbstractSet[Space]] = Recent(remember, most=REMEMBERED // 100)

    async def of_apps(self, apps: Collection[AppId]) -> Mapping[AppId, Space]:
        """The space of each of these apps; apps that do not exist are left out. Raises Unavailable."""
        found = {app: space for app in apps if (space := self._apps.get(app)) is not None}
        missing = [app for app in apps if app not in found and _GUID.fullmatch(app)]
        for some in await _in_chunks(missing, self._ask_apps):
            found.update(some)
        return found

    async def developed(self, subject: str, spaces: AbstractSet[Space]) -> AbstractSet[Space]:
        """In which of these spaces this user or client is a developer. Raises Unavailable."""
        if not _GUID.fullmatch(subject):
            return frozenset()
        found = {space for space in spaces if self._roles.get((subject, space))}
        for some in await _in_chunks(sorted(spaces - found), lambda chunk: self._ask_roles(subject, chunk)):
            found.update(spaces & some)
        for space in found:
            self._roles.put((subject, space), True)
        return found

    async def apps_of(self, subject: str, apps: Collection[AppId]) -> AbstractSet[AppId]:
        """Which of these apps lie in spaces in which this user or client is a developer. Raises Unavailable."""
        if not _GUID.fullmatch(subject):
            return frozenset()
        own = self._own.get(subject)
        if own is None:
            own = frozenset(await self._ask_roles(subject))
            self._own.put(subject, own)
        if not own:
            return frozenset()
        if len(apps) <= MANY:
            return {app for app, space in (await self.of_apps(apps)).items() if space in own}
        mine = {app for some in await _in_chunks(sorted(own), self._ask_apps_in) for app in some}
        return mine & set(apps)

    async def existing(self, apps: Collection[AppId]) -> AbstractSet[AppId]:
        """Which of these apps exist. Raises Unavailable also for a list that is not whole, or of other apps."""
        asked = [app for app in apps if _GUID.fullmatch(app)]
        return {app for some in await _in_chunks(asked, self._ask_existing) for app in some}

    async def _ask_existing(self, apps: Sequence[AppId]) -> set[AppId]:
        query = {"guids": ",".join(apps), "per_page": str(len(apps))}
        found = {app for app, _ in await self._api.resources("/v3/apps", query, _app, whole=True)}
        if not found <= set(apps):
            raise self._api.remote.unavailable("lists apps that were not asked for", "/v3/apps")
        return found

    async def _ask_apps(self, apps: Sequence[AppId]) -> dict[AppId, Space]:
        query = {"guids": ",".join(apps), "per_page": str(len(apps))}
        wanted = set(apps)
        found = {app: space for app, space in await self._api.resources("/v3/apps", query, _app) if app in wanted}
        for app, space in found.items():
            self._apps.put(app, space)
        return found

    async def _ask_apps_in(self, spaces: Sequence[Space]) -> set[AppId]:
        query = {"space_guids": ",".join(spaces), "per_page": str(PER_PAGE)}
        wanted = set(spaces)
        return {app for app, space in await self._api.resources("/v3/apps", query, _app) if space in wanted}

    async def _ask_roles(self, subject: str, spaces: Sequence[Space] = ()) -> set[Space]:
        """The spaces that this user develops: all, or at least those of `spaces`."""
        query = {"types": "space_developer", "user_guids": subject, "per_page": str(PER_PAGE)}
        if spaces:
            query["space_guids"] = ",".join(spaces)
        roles = await self._api.resources("/v3/roles", query, _role)
        return {space for kind, user, space in roles if kind == "space_developer" and user == subject}


async def _in_chunks(items: Sequence[K], ask: Callable[[Sequence[K]], Awaitable[T]]) -> list[T]:
    """The answers to `ask` for all items, as many at a time as an address has room for, some of them at once."""
    answers: list[T] = []
    for some in chunks(chunks(items, CHUNK), AT_ONCE):
        answers += await asyncio.gather(*map(ask, some))
    return answers


def _app(item: Fields) -> tuple[AppId, Space]:
    return AppId(item.text("guid")), Space(_related(item, "space"))


def _role(item: Fields) -> tuple[str, str, Space]:
    return item.text("type"), _related(item, "user"), Space(_related(item, "space"))


def _related(item: Fields, name: str) -> str:
    """The GUID at the other end of the relationship `name`, which the link of that name ends with as well."""
    if "relationships" in item:
        relationship = item.mapping("relationships").get(name)
        data = Fields(relationship, f"{item.where}: relationships.{name}").mapping("data")
        return Fields(data, f"{item.where}: relationships.{name}.data").text("guid")
    link = Fields(item.mapping("links").get(name), f"{item.where}: links.{name}")
    return link.text("href").rpartition("/")[2]
