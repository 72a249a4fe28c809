"""Server-sent events (HTML Living Standard, 9.2): endless answers, bounded in number, memory and time.

A stream is pulled: the next event is made when the client has taken the last, so that nothing piles up for who reads
slowly; who reads nothing is cut off by the connection (bus/listener.py). A comment now and then keeps
routers from cutting a quiet stream. A token is checked when a stream begins, so streams end after a while, and clients
come back by themselves; all end when the server does.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from prometheus_client import Gauge
from starlette.responses import StreamingResponse

from bus.log import about

log = logging.getLogger(__name__)

MAX_STREAMS = 200
MAX_SECONDS = 1800.0
QUIET_SECONDS = 15.0
RETRY_MS = 2000
"""After how long a client is to come back when its stream has ended."""

STREAMS = Gauge("silkbus_api_streams", "Clients that follow events")

HEARTBEAT = b": still here\n\n"


class TooManyStreams(Exception):
    """No more streams are served at the moment."""


def event(kind: str, data: Mapping[str, Any], *, number: str | None = None) -> bytes:
    """One event; `number` is what the client gives back as Last-Event-ID."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {text}\n\n".encode()


class Streams:
    """All streams of a server."""

    def __init__(self) -> None:
        self._stopping = asyncio.Event()
        self._open = 0

    def stop(self) -> None:
        """End them all: the server ends."""
        self._stopping.set()

    def answer(self, events: AsyncIterator[bytes]) -> StreamingResponse:
        """An answer that goes on as long as `events`, the client and the server do. Raises TooManyStreams."""
        if self._open >= MAX_STREAMS:
            raise TooManyStreams(f"{MAX_STREAMS} streams are open already")
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._run(events), media_type="text/event-stream", headers=headers)

    async def _run(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._open += 1
        STREAMS.inc()
        stopping = asyncio.create_task(self._stopping.wait())
        following: asyncio.Task[bytes] | None = None
        end = time.monotonic() + MAX_SECONDS
        try:
            yield f"retry: {RETRY_MS}\n\n".encode()
            while (left := end - time.monotonic()) > 0:
                following = following or asyncio.ensure_future(anext(events))
                await asyncio.wait(
                    {stopping, following}, timeout=min(left, QUIET_SECONDS), return_when=asyncio.FIRST_COMPLETED
                )
                if stopping.done():
                    return
                if not following.done():
                    yield HEARTBEAT
                    continue
                try:
                    data = following.result()
                except StopAsyncIteration:
                    return
                except Exception as error:  # noqa: BLE001 (the answer has begun: the client can only come back)
                    log.warning("a stream ends", extra=about(error=repr(error)))
                    return
                following = None
                yield data
        finally:
            self._open -= 1
            STREAMS.dec()
            stopping.cancel()
            if following is not None:  # not waited for: who is being cancelled may not wait
                following.cancel()
