"""Publishes what is in the outbox: one event after the other, each crossed out once JetStream has acknowledged it."""

import asyncio
import logging
from datetime import UTC, datetime

from nats.js.errors import NoStreamResponseError, ServiceUnavailableError
from tenacity import AsyncRetrying, RetryCallState, wait_random_exponential

from bus import subjects
from bus.connection import Connection
from bus.events.event import header_value
from bus.log import about
from bus.messages import CellName
from bus.process import check_cancelled
from bus.wire import encode
from services.networker.outbox import Lifecycle, Outbox

log = logging.getLogger(__name__)

TIMEOUT = 5.0
MAX_BACKOFF = 30.0


class Announcer:
    def __init__(self, connection: Connection, cell: CellName, outbox: Outbox) -> None:
        self._connection = connection
        self._cell = cell
        self._outbox = outbox
        self._reconnected = asyncio.Event()

    async def run(self) -> None:
        """Publish for ever. Whatever fails is logged and tried again, with back-off; nothing waits for it."""
        self._connection.on_connect(self._reconnected.set)
        while True:
            await self._outbox.more.wait()
            if not await self._connection.wait_connected(TIMEOUT):
                continue
            # No limit on the attempts: the events wait on disk, and how many they may be is bounded there.
            async for attempt in AsyncRetrying(
                wait=wait_random_exponential(0.2, max=MAX_BACKOFF), before_sleep=_say, sleep=self._pause
            ):
                with attempt:
                    await self._publish_all()

    async def _publish_all(self) -> None:
        while (event := self._outbox.first) is not None:
            self._reconnected.clear()
            jetstream = self._connection.jetstream(TIMEOUT)
            subject = subjects.container(self._cell, event.kind)
            stream = subjects.event_stream(subjects.CONTAINERS)
            await jetstream.publish(subject, encode(event.data), stream=stream, headers=headers(event, self._cell))
            check_cancelled()
            await self._outbox.published(event)

    async def _pause(self, seconds: float) -> None:
        """Wait before trying again, but not beyond the next connection."""
        try:
            async with asyncio.timeout(seconds):
                await self._reconnected.wait()
        except TimeoutError:
            pass


def headers(event: Lifecycle, cell: CellName) -> dict[str, str]:
    """CloudEvents' attributes (docs/events.md); and the id once more, by which JetStream drops what is sent again.

    Other than with tables (bus.events.stream) nobody refills this stream, so that can only drop what it once had.
    """
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": f"/silkbus/containers/{cell}",
        "type": f"org.silkbus.container.{event.kind}.v1",
        "subject": event.handle,
        "time": datetime.fromtimestamp(event.at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "datacontenttype": "application/msgpack",
    }
    return {f"ce-{name}": header_value(value) for name, value in attributes.items()} | {"Nats-Msg-Id": event.id}


def _say(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    fields = about(attempt=state.attempt_number, error=repr(error))
    if isinstance(error, (ServiceUnavailableError, NoStreamResponseError)):
        fields["about"]["advice"] = (
            "start nats-server with JetStream (-js), and a Silk controller, which makes the stream"
        )
    log.warning("container events not published, trying again; containers do not need them", extra=fields)
