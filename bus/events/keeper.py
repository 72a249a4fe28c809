"""Sees that the stream of container events is there, with a consumer for each reader.

Other than a table's events these come from the cells, which may publish and no more; so a central service makes their
stream. Cells keep what they cannot publish (services/networker/outbox.py), so that nothing is lost until it is there.
"""

import asyncio
import logging
from collections.abc import Iterable

from nats.js.errors import NoStreamResponseError, ServiceUnavailableError
from tenacity import AsyncRetrying, RetryCallState, wait_random_exponential

from bus import subjects
from bus.connection import Connection
from bus.events.stream import EventStream
from bus.log import about
from bus.process import check_cancelled

log = logging.getLogger(__name__)

LOOK_SECONDS = 15.0
"""How soon a stream that somebody deleted is made again."""
TIMEOUT = 5.0
MAX_BACKOFF = 30.0


class ContainerStream:
    """`readers` and `replicas` as for the other streams (bus.events.relay)."""

    def __init__(self, connection: Connection, *, readers: Iterable[str] = (), replicas: int = 1) -> None:
        self._connection = connection
        subject = subjects.container("*", "*")
        self._stream = EventStream(subjects.CONTAINERS, readers=readers, replicas=replicas, subject=subject)
        self._reconnected = asyncio.Event()

    async def run(self) -> None:
        """Look for ever. Whatever fails is logged and tried again, with back-off."""
        self._connection.on_connect(self._reconnected.set)
        while True:
            if not await self._connection.wait_connected(LOOK_SECONDS):
                continue
            self._reconnected.clear()
            async for attempt in AsyncRetrying(
                wait=wait_random_exponential(0.2, max=MAX_BACKOFF), before_sleep=self._say, sleep=self._pause
            ):
                with attempt:
                    await self._stream.end(self._connection.jetstream(TIMEOUT))
            check_cancelled()
            await self._pause(LOOK_SECONDS)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the next connection."""
        try:
            async with asyncio.timeout(seconds):
                await self._reconnected.wait()
        except TimeoutError:
            pass

    def _say(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        fields = about(stream=self._stream.name, attempt=state.attempt_number, error=repr(error))
        if isinstance(error, (ServiceUnavailableError, NoStreamResponseError)):
            fields["about"]["advice"] = "start nats-server with JetStream (-js), and let this user call it"
        log.warning("the stream of container events is not there; cells keep their events", extra=fields)
