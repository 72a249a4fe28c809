"""The Cloud Controller: in which spaces apps lie, and in which a user is a developer. Its API v3 only.

`GET /v3/apps?guids=` and `GET /v3/roles?types=space_developer&user_guids=` (roles since CC API 3.77), with the token of
our own client, which may read everything; so what comes back is compared with what was asked for, lest a filter that
was not understood give somebody everybody's spaces. Pages are asked for by number: the links to the next page name the
public address, where our token has no business.

Answers are remembered for seconds. Only such as help the caller: an app pushed or a role given a moment ago counts at
once, while one taken away counts that much later.
"""

import asyncio
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar

from bus.decode import Fields, Malformed
from bus.messages import AppId
from services.policy.access import Space
from services.policy.recent import Recent
from services.policy.remote import Answer, Remote
from services.policy.rows import chunks
from services.policy.uaa import OwnToken

T = TypeVar("T")

CHUNK = 100
"""Apps asked for at once, as the original does: longer addresses are refused on the way."""
AT_ONCE = 4
ROLES_PER_PAGE = 500
MAX_PAGES = 1000
REMEMBERED_APPS = 100_000
REMEMBERED_USERS = 1000
_GUID = re.compile(r"[0-9A-Za-z_.~-]{1,64}")
"""What an id must look like to be asked for. Commas part the ids in a query, so one in an id would make it two."""


class CloudController:
    """What the Cloud Controller knows, as `services.policy.access.Spaces`. Answers are used for `remember` seconds."""

    def __init__(self, remote: Remote, token: OwnToken, *, remember: float) -> None:
        self._remote = remote
        self._token = token
        self._apps: Recent[AppId, Space] = Recent(remember, most=REMEMBERED_APPS)
        self._developers: Recent[str, AbstractSet[Space]] = Recent(remember, most=REMEMBERED_USERS)

    async def of_apps(self, apps: Collection[AppId]) -> Mapping[AppId, Space]:
        """The space of each of these apps; apps that do not exist are left out. Raises Unavailable."""
        found = {app: space for app in apps if (space := self._apps.get(app)) is not None}
        missing = (app for app in apps if app not in found and _GUID.fullmatch(app))
        for some in chunks(chunks(missing, CHUNK), AT_ONCE):
            for answer in await asyncio.gather(*map(self._ask_apps, some)):
                found.update(answer)
        return found

    async def developed_by(self, subject: str, wanted: AbstractSet[Space] = frozenset()) -> AbstractSet[Space]:
        """The spaces in which this user or client is a developer. Raises Unavailable."""
        if not _GUID.fullmatch(subject):
            return frozenset()
        known = self._developers.get(subject)
        if known is not None and wanted <= known:
            return known
        query = {"types": "space_developer", "user_guids": subject, "per_page": str(ROLES_PER_PAGE)}
        spaces = frozenset(await self._list("/v3/roles", query, lambda item: _role(item, subject)))
        self._developers.put(subject, spaces)
        return spaces

    async def _ask_apps(self, apps: Sequence[AppId]) -> dict[AppId, Space]:
        query = {"guids": ",".join(apps), "per_page": str(len(apps))}
        asked = set(apps)
        found = dict(await self._list("/v3/apps", query, lambda item: _app(item, asked)))
        for app, space in found.items():
            self._apps.put(app, space)
        return found

    async def _list(self, path: str, query: Mapping[str, str], read: Callable[[Fields], Iterable[T]]) -> list[T]:
        """What `read` makes of the resources on all pages of a list."""
        found: list[T] = []
        page, pages = 1, 1
        while page <= pages:
            answer = await self._get(path, {**query, "page": str(page)} if page > 1 else query)
            try:
                fields = Fields(self._remote.read(answer, path), path)
                if "pagination" in fields:
                    pagination = Fields(fields.mapping("pagination"), f"{path}: pagination")
                    pages = pagination.integer("total_pages", high=MAX_PAGES)
                for item in fields.items("resources"):
                    found += read(Fields(item, f"{path}: resource"))
            except Malformed as error:
                raise self._remote.malformed(error, path) from None
            page += 1
        return found

    async def _get(self, path: str, query: Mapping[str, str]) -> Answer:
        for _ in range(2):
            token = await self._token.get()
            answer = await self._remote.ask("GET", path, query=query, token=token)
            if answer.status != 401:
                break
            self._token.refused(token)
        if answer.status in (401, 403):
            raise self._remote.unavailable(
                "does not accept this server's token; the client uaa_client needs the authority "
                "cloud_controller.admin_read_only",
                path,
                answer.body,
            )
        if answer.status == 404:
            raise self._remote.unavailable(
                f"has no {path}: cc_url must lead to one with API 3.77 or later", path, answer.body
            )
        return answer


def _app(item: Fields, asked: AbstractSet[AppId]) -> Iterable[tuple[AppId, Space]]:
    app = AppId(item.text("guid"))
    return [(app, _space(item))] if app in asked else []


def _role(item: Fields, subject: str) -> Iterable[Space]:
    same = item.text("type") == "space_developer" and _related(item, "user") == subject
    return [_space(item)] if same else []


def _space(item: Fields) -> Space:
    return Space(_related(item, "space"))


def _related(item: Fields, name: str) -> str:
    """The GUID at the other end of the relationship `name`, which the link of that name ends with as well."""
    if "relationships" in item:
        relationship = item.mapping("relationships").get(name)
        data = Fields(relationship, f"{item.where}: relationships.{name}").mapping("data")
        return Fields(data, f"{item.where}: relationships.{name}.data").text("guid")
    link = Fields(item.mapping("links").get(name), f"{item.where}: links.{name}")
    return link.text("href").rpartition("/")[2]
