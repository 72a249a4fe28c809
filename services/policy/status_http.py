"""`GET …/status`, `…/status/follow` and `…/events`: their parameters, and their answers.

    {"revision": 7, "head": 9, "realised": false,
     "enforcing": {"count": 2, "cells": ["cell-1", "cell-2"]},
     "behind": {"count": 1, "cells": [{"cell": "cell-3", "revision": 6, "problem": null}]},
     "unreachable": {"count": 1, "cells": [{"cell": "cell-4", "silent_seconds": 31}]},
     "leases_known": true, "bus_connected": true}

Which cells there are is the operators' to know: those who are no admins get the counts alone.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bus.messages import Revision
from services.policy.access import is_admin
from services.policy.endpoint import RETRY_AFTER, ApiError, Call, Operation
from services.policy.event_feed import EventFeed
from services.policy.history_http import BadParameter, integer
from services.policy.identity import ADMIN, WRITE
from services.policy.realisation import Realisation, Status
from services.policy.sse import Streams, TooManyStreams, event

LOOK_SECONDS = 1.0
"""How often is looked, beside what changes, for cells that have fallen silent."""
INTERVAL = 0.2
PARAMETERS = ("revision",)


class StatusApi:
    """The handlers; `streams` are to be stopped before the server is."""

    def __init__(self, realisation: Realisation, feed: EventFeed, streams: Streams) -> None:
        self._realisation = realisation
        self._feed = feed
        self._streams = streams

    def routes(self, route: Callable[..., Route], external: str) -> list[Route]:
        """The routes under this path, each made by `route` (Endpoints.route)."""
        return [
            route(f"{external}/status", GET=Operation("Status", self.status, (ADMIN, WRITE))),
            route(f"{external}/status/follow", GET=Operation("StatusFollow", self.follow, (ADMIN, WRITE))),
            route(f"{external}/events", GET=Operation("Events", self.events, (ADMIN,))),
        ]

    async def status(self, call: Call) -> Response:
        """The status at this moment."""
        status = self._realisation.status(_revision(call.request))
        body = json.dumps(encode(status, cells=is_admin(call.identity)), separators=(",", ":"))
        return Response(body, media_type="application/json")

    async def follow(self, call: Call) -> Response:
        """Events `status` whenever it changes; the last one is `realised`."""
        return self._stream(self._progress(_revision(call.request), cells=is_admin(call.identity)))

    async def events(self, call: Call) -> Response:
        """The events of policies and leases."""
        last = call.request.headers.get("last-event-id") or call.request.query_params.get("last_event_id")
        return self._stream(self._feed.follow(last))

    async def _progress(self, revision: Revision | None, *, cells: bool) -> AsyncIterator[bytes]:
        if revision is None:
            revision = self._realisation.status().head
        said: Any = None
        while True:
            status = self._realisation.status(revision)
            now = encode(status, cells=cells)
            if status.realised:
                yield event("realised", now)
                return
            # How long a cell has been silent is no news.
            news = [now["behind"], now["enforcing"], [name for name, _ in status.unreachable], status.known, status.bus]
            if news != said:
                said = news
                yield event("status", now)
            await self._realisation.paced(LOOK_SECONDS, INTERVAL)

    def _stream(self, events: AsyncIterator[bytes]) -> Response:
        try:
            return self._streams.answer(events)
        except TooManyStreams as error:
            raise ApiError(503, f"{error}; try again shortly", {"Retry-After": str(RETRY_AFTER)}) from None


def encode(status: Status, *, cells: bool) -> dict[str, Any]:
    """The answer as JSON has it."""
    groups: dict[str, list[Any]] = {
        "enforcing": list(status.enforcing),
        "behind": [
            {"cell": cell, "revision": revision, "problem": problem or None}
            for cell, revision, problem in status.behind
        ],
        "unreachable": [
            {"cell": cell, "silent_seconds": None if silent is None else round(silent)}
            for cell, silent in status.unreachable
        ],
    }
    return {
        "revision": status.revision,
        "head": status.head,
        "realised": status.realised,
        **{name: {"count": len(items), **({"cells": items} if cells else {})} for name, items in groups.items()},
        "leases_known": status.known,
        "bus_connected": status.bus,
    }


def _revision(request: Request) -> Revision | None:
    for name in request.query_params:
        if name not in PARAMETERS:
            raise ApiError(400, f"{name}: no such parameter; there is revision")
    try:
        value = integer(request.query_params, "revision")
    except BadParameter as error:
        raise ApiError(400, str(error)) from None
    return None if value is None else Revision(value)
