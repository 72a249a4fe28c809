"""The JetStream side of the event stream of one table: making it, reading its end, appending to it.

Appending expects the sequence number that the stream had when its end was read, and JetStream refuses the message when
anything was added since. That alone keeps several relays in order. `Nats-Msg-Id`, and the expectation of the last one,
are deliberately not used (tried on nats-server 2.15.1): within its two minutes the server takes an id that it has seen
for a duplicate, acknowledges it and stores nothing, also after the stream was purged, so a stream that was emptied
could not be refilled.

Readers do not make their consumers: whoever may make one may have JetStream deliver to any subject, and so speak in its
name. They are made here, one for each reader, of its name.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, NotFoundError

from bus import subjects
from bus.events.event import Event, EventId
from bus.failpoints import failpoint
from bus.log import about

log = logging.getLogger(__name__)

MAX_EVENTS = 100_000
MAX_BYTES = 128 << 20
"""JetStream sets this much of its storage aside when it makes the stream, and refuses to when it has less."""
LOOK_BACK = 256
CONSUMERS_SECONDS = 60.0
"""How soon a consumer is made again that somebody deleted; one that went with its stream is at once."""
_WRONG_LAST_SEQUENCE = (10071, 10164)
"""JetStream's error codes for an expectation that does not hold (JSStreamWrongLastSequence…Err)."""


class JetStream(Protocol):
    """The calls of nats-py's JetStreamContext that are used here."""

    async def stream_info(self, name: str) -> Any: ...
    async def add_stream(self, config: Any) -> Any: ...
    async def add_consumer(self, stream: str, config: Any) -> Any: ...
    async def get_msg(self, stream_name: str, seq: int) -> Any: ...
    async def publish(self, subject: str, payload: bytes, *, stream: str, headers: dict[str, str]) -> Any: ...


class Overtaken(Exception):
    """Something was added to the stream since its end was read."""


@dataclass(frozen=True, slots=True)
class End:
    """What a stream holds: when it was made, and the sequence numbers of its first and last message.

    An empty one has `first` after `last`; `last` is the last number given, and does not go back when it is purged.
    """

    created: datetime | None
    first: int
    last: int

    def after(self, added: int) -> "End":
        """What it holds once so many messages are added."""
        return replace(self, last=self.last + added)


class EventStream:
    """The stream of one table. `replicas` is how many servers of a cluster keep it, when it is made here.

    `subject` is what it takes in, if not the table's events.
    """

    def __init__(self, table: str, *, readers: Iterable[str], replicas: int, subject: str | None = None) -> None:
        self.name = subjects.event_stream(table)
        self._readers = tuple(readers)
        self._consumers_of: datetime | None = None
        self._consumers_due = 0.0
        self._config = StreamConfig(
            name=self.name,
            description=f"Events of the table {table}; refilled from SQL if lost"
            if subject is None
            else f"Of {subject}",
            subjects=[subject or subjects.event(table, ">")],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            # By number and size, never by age: the last message is the relays' position, and must outlive a quiet year.
            max_msgs=MAX_EVENTS,
            max_bytes=MAX_BYTES,
            max_age=0,
            num_replicas=replicas,
        )

    async def end(self, jetstream: JetStream) -> End:
        """What the stream holds now. It is made if it is not there, and left as it is if its limits were changed."""
        try:
            info = await jetstream.stream_info(self.name)
        except NotFoundError:
            info = await jetstream.add_stream(self._config)
        if info.created != self._consumers_of or time.monotonic() > self._consumers_due:
            await self._make_consumers(jetstream)
            self._consumers_of, self._consumers_due = info.created, time.monotonic() + CONSUMERS_SECONDS
        return End(info.created, info.state.first_seq, info.state.last_seq)

    async def _make_consumers(self, jetstream: JetStream) -> None:
        """See that each reader has its consumer; one that exists goes on where it is."""
        for reader in self._readers:
            config = ConsumerConfig(
                name=reader,
                durable_name=reader,
                deliver_policy=DeliverPolicy.ALL,
                ack_policy=AckPolicy.EXPLICIT,
            )
            try:
                await jetstream.add_consumer(self.name, config)
            except APIError as error:  # one of its own making, say, that is of another kind: no reason to stop
                fields = about(stream=self.name, reader=reader, error=repr(error))
                log.warning("no consumer made for a reader; delete the one of its name", extra=fields)

    async def backwards(self, jetstream: JetStream, end: End) -> AsyncIterator[EventId | None]:
        """The ids of the messages, the last first; None for one that is gone or not an event of ours.

        Reads ahead by more and more, so the last one is cheap and the whole stream bearable.
        """
        newest, count = end.last, 1
        while newest >= max(end.first, 1):
            oldest = max(end.first, 1, newest - count + 1)
            for found in await asyncio.gather(*(self._id(jetstream, at) for at in range(newest, oldest - 1, -1))):
                yield found
            newest, count = oldest - 1, min(count * 4, LOOK_BACK)

    async def _id(self, jetstream: JetStream, sequence: int) -> EventId | None:
        try:
            message = await jetstream.get_msg(self.name, sequence)
        except NotFoundError:
            return None
        return EventId.parse((message.headers or {}).get("ce-id", ""))

    async def append(self, jetstream: JetStream, end: End, events: Sequence[Event], previous: EventId | None) -> None:
        """Add these events after `end`, all of them sent at once.

        Each expects the one before it, so when one is lost or refused all that follow are. Raises Overtaken, or what
        JetStream's client raises; then the first few of them may have been added.
        """
        failpoint("events.before-publish")
        sending = []
        for place, event in enumerate(events):
            headers = event.headers(previous) | {"Nats-Expected-Last-Sequence": str(end.last + place)}
            sending.append(self._publish(jetstream, event, headers))
            previous = event.id
        for result in await asyncio.gather(*sending, return_exceptions=True):
            if isinstance(result, APIError) and result.err_code in _WRONG_LAST_SEQUENCE:
                raise Overtaken from None
            if isinstance(result, BaseException):
                raise result

    async def _publish(self, jetstream: JetStream, event: Event, headers: dict[str, str]) -> None:
        await jetstream.publish(event.subject, event.body, stream=self.name, headers=headers)
        failpoint("events.after-publish")
