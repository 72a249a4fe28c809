"""Asking the Cloud Controller's API v3: with our own token, and lists page by page.

Pages are asked for by number: the links to the next page name the public address, where our token has no business.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from bus.decode import Fields, Malformed
from services.policy.identity import Unavailable
from services.policy.remote import Answer, Remote
from services.policy.uaa import OwnToken

T = TypeVar("T")

MAX_PAGES = 1000
LONG = 64 << 10
"""Bytes from which an answer is read beside the event loop."""


class Incomplete(Unavailable):
    """A list holds more or less than it says: it changed while it was read, or was cut short."""


class Api:
    """The API at `remote`, asked with the token of our own client."""

    def __init__(self, remote: Remote, token: OwnToken) -> None:
        self.remote = remote
        self._token = token

    async def resources(
        self, path: str, query: Mapping[str, str], read: Callable[[Fields], T], *, whole: bool = False
    ) -> list[T]:
        """What `read` makes of the resources on all pages of a list. Raises Unavailable.

        With `whole` also Incomplete for a list that holds more or less than it says.
        """
        found: list[T] = []
        page, pages, total = 1, 1, 0
        while page <= pages:
            answer = await self.get(path, {**query, "page": str(page)} if page > 1 else query)
            if len(answer.body) > LONG:
                items, paging = await asyncio.to_thread(self._page, answer, path, read)
            else:
                items, paging = self._page(answer, path, read)
            if paging is not None:
                pages, total = paging
            elif whole:
                raise self.remote.unavailable("gives a list without pagination", path)
            found += items
            page += 1
        if whole and len(found) != total:
            raise Incomplete(str(self.remote.unavailable(f"lists {len(found)} of what it says are {total}", path)))
        return found

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Answer:
        """The answer, with a status below 500 and none of 401, 403, 404 and 429. Raises Unavailable."""
        answer = await self.get_if_there(path, query)
        if answer is None:
            raise self.remote.unavailable(f"has no {path}: cc_url must lead to one with API 3.77 or later", path)
        return answer

    async def get_if_there(self, path: str, query: Mapping[str, str] | None = None) -> Answer | None:
        """As `get`, but None for 404."""
        for _ in range(2):
            token = await self._token.get()
            answer = await self.remote.ask("GET", path, query=query, token=token)
            if answer.status != 401:
                break
            self._token.refused(token)
        if answer.status in (401, 403):
            raise self.remote.unavailable(
                "does not accept this server's token; the client uaa_client needs the authority "
                "cloud_controller.admin_read_only",
                path,
                answer.body,
            )
        return None if answer.status == 404 else answer

    def _page(self, answer: Answer, path: str, read: Callable[[Fields], T]) -> tuple[list[T], tuple[int, int] | None]:
        """The items of a page; and how many pages and items there are, if it says so."""
        try:
            fields = Fields(self.remote.read(answer, path), path)
            paging = None
            if "pagination" in fields:
                pagination = Fields(fields.mapping("pagination"), f"{path}: pagination")
                total = pagination.integer("total_results") if "total_results" in pagination else -1
                paging = pagination.integer("total_pages", high=MAX_PAGES), total
            return [read(Fields(item, f"{path}: resource")) for item in fields.items("resources")], paging
        except Malformed as error:
            raise self.remote.malformed(error, path) from None
