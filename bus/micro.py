"""What a connection serves, offered as a NATS micro service: anyone permitted can find it and see how it fares.

`nats micro list`, `info` and `stats`, and whatever else speaks ADR-32 (`$SRV.PING`, `$SRV.INFO`, `$SRV.STATS`, each for
all, by name, and by instance), work on every service without a word in the service itself: an endpoint is whatever it
serves. nats-py has the same as a class around one client; ours outlive clients, so only its messages' shapes are used.
"""

import asyncio
import importlib.metadata
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from nats.aio.msg import Msg
from nats.micro.service import (
    EndpointInfo,
    EndpointStats,
    ServiceInfo,
    ServicePing,
    ServiceStats,
    ServiceVerb,
    control_subject,
)
from nats.nuid import NUID
from prometheus_client import Counter

from bus import subjects
from bus.decode import Fields, Malformed
from bus.log import about
from bus.wire import decode, encode

log = logging.getLogger(__name__)

MAX_CONCURRENT_ANSWERS = 256

MALFORMED = Counter("silkbus_bus_malformed_total", "Messages refused because they could not be understood")

Answer = Sequence[Mapping[str, Any]]
PartsAnswerer = Callable[[str, Fields], Awaitable[Answer]]
Send = Callable[[str, bytes, Mapping[str, str] | None], Awaitable[bool]]
"""Sends bytes to a subject, with headers; whether they were handed to a connection is the answer."""


class Endpoint:
    """One subject that is served: takes requests, many at a time, answers them, and counts."""

    def __init__(self, subject: str, queue: str, answerer: PartsAnswerer, send: Send) -> None:
        self.subject = subject
        self.queue = queue
        self.name = "-".join(part for part in subject.split(".")[1:] if part not in "*>")
        self._answerer = answerer
        self._send = send
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_ANSWERS)
        self._answering: set[asyncio.Task[None]] = set()
        self._requests = 0
        self._errors = 0
        self._last_error = ""
        self._nanoseconds = 0

    async def take(self, message: Msg) -> None:
        """Start answering a request; waits while too many are being answered."""
        if message.reply and not subjects.is_inbox(message.reply):
            # We may publish where the one who asks may not: an answer must not carry its words there.
            MALFORMED.inc()
            fields = about(subject=message.subject, reply=message.reply)
            log.warning("request refused: its answer is not for an inbox", extra=fields)
            return
        await self._slots.acquire()
        task = asyncio.create_task(self._answer(message))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, message: Msg) -> None:
        begun = time.perf_counter_ns()
        headers = None
        try:
            request = decode(message.data, f"request {message.subject}")
            answer = [encode(part) for part in await self._answerer(message.subject, request)]
        except Malformed as error:
            MALFORMED.inc()
            answer, headers = self._failed("400", str(error))
        except Exception as error:  # one bad request must not end the service
            log.exception("request failed", extra=about(subject=message.subject))
            answer, headers = self._failed("500", f"unexpected error: {error!r}; see the server's log")
        finally:
            self._slots.release()
            self._requests += 1
            self._nanoseconds += time.perf_counter_ns() - begun
        for part in answer if message.reply else ():
            if not await self._send(message.reply, part, headers):
                break

    def _failed(self, code: str, text: str) -> tuple[list[bytes], Mapping[str, str]]:
        self._errors += 1
        self._last_error = text
        # A header is one line of Latin letters at most; the body has the whole text.
        line = text.encode("ascii", "replace").decode().splitlines()[0][:200]
        return [encode({"error": text})], {"Nats-Service-Error": line, "Nats-Service-Error-Code": code}

    def info(self) -> EndpointInfo:
        return EndpointInfo(self.name, self.subject, self.queue)

    def stats(self) -> EndpointStats:
        return EndpointStats(
            name=self.name,
            subject=self.subject,
            queue_group=self.queue,
            num_requests=self._requests,
            num_errors=self._errors,
            processing_time=self._nanoseconds,
            average_processing_time=self._nanoseconds // max(1, self._requests),
            last_error=self._last_error,
        )


class Service:
    """All endpoints of one connection, under the name of its role."""

    def __init__(self, role: str, instance: str) -> None:
        self.name = role
        self.endpoints: list[Endpoint] = []
        self._same: dict[str, Any] = {
            "id": NUID().next().decode(),
            "name": role,
            "version": importlib.metadata.version("silkbus"),
            "metadata": {"instance": instance},
        }
        self._started = datetime.now(UTC)

    def control_subjects(self) -> list[str]:
        """The subjects of ADR-32 on which this service is asked about itself; everyone gets each question."""
        names = ((), (self.name,), (self.name, self._same["id"]))
        return [control_subject(verb, *name) for verb in ServiceVerb for name in names]

    def describe(self, subject: str) -> bytes:
        """The answer to a question that came on one of them, as JSON."""
        answer: ServicePing | ServiceInfo | ServiceStats
        match subject.split(".")[1]:
            case ServiceVerb.PING:
                answer = ServicePing(**self._same)
            case ServiceVerb.INFO:
                answer = ServiceInfo(**self._same, endpoints=[endpoint.info() for endpoint in self.endpoints])
            case _:
                endpoints = [endpoint.stats() for endpoint in self.endpoints]
                answer = ServiceStats(**self._same, started=self._started, endpoints=endpoints)
        return json.dumps(answer.to_dict()).encode()
