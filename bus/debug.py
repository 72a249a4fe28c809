"""The debug server: sets the log level of the running process (contract/policy.md 1.12).

It has no authentication and belongs on loopback. Whatever it is sent, it answers 200 with nothing; what it does not
understand changes nothing. There is no profiler: `py-spy` needs none.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bus.listener import BoundedProtocol, listening
from bus.local import serving
from bus.log import about

log = logging.getLogger(__name__)

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "error": logging.ERROR, "fatal": logging.CRITICAL}
LEVELS = {
    **{word: level for number, (name, level) in enumerate(_LEVELS.items()) for word in (name, name[0], str(number))},
    "warn": logging.WARNING,
    "warning": logging.WARNING,
}
"""Levels by their names, first letters and numbers; words also in capitals. The original has no warnings."""
MAX_BODY = 64


def application() -> Starlette:
    route = Route("/log-level", _log_level)
    route.methods = None  # any
    return Starlette(routes=[route])


@asynccontextmanager
async def debugging(where: str) -> AsyncIterator[None]:
    """The debug server at this address; none if it is empty. Raises bus.listener.CannotListen."""
    if not where:
        yield
        return
    with listening(where) as listener:
        async with serving(application(), listener, protocol=BoundedProtocol):
            yield


async def _log_level(request: Request) -> Response:
    body = b""
    async for part in request.stream():
        body = (body + part)[:MAX_BODY]
    word = body.decode(errors="replace").strip()
    level = LEVELS.get(word.lower() if word.isupper() else word)
    if level is not None:
        logging.getLogger().setLevel(level)
        log.log(level, "log level set", extra=about(level=logging.getLevelName(level)))
    return Response()
