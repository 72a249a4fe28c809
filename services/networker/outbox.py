"""Lifecycle events of containers (docs/events.md): written down here before anybody is answered, published when the bus
is there, crossed out when JetStream has acknowledged them. So each is told at least once, whatever dies.

A file of one JSON object a line: appending costs one fsync, and a line that a crash cut short is of a call that was
never answered. What is published stays in it until all are, or until many are; a restart in between publishes those
again, with the ids they had.
"""

import json
import logging
import os
import time
from asyncio import Event as Flag
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge

from bus.decode import Fields
from bus.log import about
from bus.messages import CellName, Handle
from bus.process import KernelThread
from services.networker.record import Attachment

log = logging.getLogger(__name__)

MAX_EVENTS = 20_000
"""A day and a half without the bus at ten containers a minute, in some 10 MB."""
REWRITE = 500
WAITING = Gauge("silkbus_networker_events_waiting", "Lifecycle events not yet acknowledged by the bus")
LOST = Counter("silkbus_networker_events_lost_total", "Lifecycle events dropped because too many waited for the bus")


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """One event: created, ports or deleted. Equal ids are the same event, ever."""

    id: str
    kind: str
    handle: Handle
    at_ms: int
    data: Mapping[str, Any]

    def encode(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "handle": self.handle,
            "at_ms": self.at_ms,
            "data": dict(self.data),
        }

    @classmethod
    def decode(cls, value: object) -> "Lifecycle":
        fields = Fields(value, "event")
        return cls(
            fields.text("id"),
            fields.text("kind"),
            Handle(fields.text("handle")),
            fields.integer("at_ms"),
            fields.mapping("data"),
        )


def event_of(kind: str, cell: CellName, attachment: Attachment) -> Lifecycle:
    """The event that an attachment was created or deleted, or that its ports are others now.

    Its id is made of what the record keeps, so that doing the same again after a crash tells the same event again.
    Ports are only ever added, so their number tells two such events apart.
    """
    identity, link = attachment.identity, attachment.link
    suffix = f".{len(attachment.forwards)}" if kind == "ports" else ""
    data: dict[str, Any] = {
        "cell": cell,
        "handle": attachment.handle,
        "app": identity.app,
        "space": identity.space,
        "org": _text(identity.metadata.get("org_id")),
        "instance": _instance(identity.metadata.get("log_config")),
        "workload": None if identity.workload is None else str(identity.workload),
        "address": None if link is None else str(link.address),
        "ports": list(identity.ports),
        "forwards": [forward.encode() for forward in attachment.forwards],
    }
    name = f"containers.{cell}.{attachment.birth}.{kind}{suffix}"
    return Lifecycle(name, kind, attachment.handle, time.time_ns() // 1_000_000, data)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _instance(log_config: object) -> int | None:
    """The instance's number, which Diego has in the property log_config (contract/cell.md 2.8)."""
    try:
        index = json.loads(log_config)["index"] if isinstance(log_config, str) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return index if type(index) is int and 0 <= index < 2**31 else None


class Outbox:
    """The events of a cell that the bus has not acknowledged. `load` and `add` before anything else of it."""

    def __init__(self, file: Path, disk: KernelThread) -> None:
        self._file = file
        self._disk = disk
        self._waiting: deque[Lifecycle] = deque()
        self._done = 0
        self.more = Flag()

    async def load(self) -> None:
        """Take up what waited when the last run ended."""
        try:
            lines = await self._disk.run(self._read)
        except OSError as error:
            log.error("events of the last run cannot be read", extra=about(file=str(self._file), error=str(error)))
            return
        for line in lines:
            try:
                self._waiting.append(Lifecycle.decode(json.loads(line)))
            except (ValueError, RecursionError) as error:  # Malformed is one, too
                log.warning("an event that cannot be read", extra=about(file=str(self._file), error=str(error)))
        await self._rewrite()
        self._tell()

    async def add(self, event: Lifecycle) -> None:
        """Write an event down. Where the disk refuses, it is kept in memory: no reason not to start a container."""
        self._waiting.append(event)
        try:
            await self._disk.run(self._append, event)
        except OSError as error:
            fields = about(file=str(self._file), id=event.id, error=str(error))
            log.error("event not written down; it is lost if the networker ends before the bus has it", extra=fields)
        if len(self._waiting) > MAX_EVENTS:
            lost = self._waiting.popleft()
            LOST.inc()
            self._done += 1
            log.error("too many events wait for the bus, the oldest is dropped", extra=about(id=lost.id))
        self._tell()

    @property
    def first(self) -> Lifecycle | None:
        return self._waiting[0] if self._waiting else None

    async def published(self, event: Lifecycle) -> None:
        """Cross out the first event, if it is this one still."""
        if self._waiting and self._waiting[0] is event:
            self._waiting.popleft()
            self._done += 1
        self._tell()
        if not self._waiting or self._done >= REWRITE:
            await self._rewrite()

    def _tell(self) -> None:
        WAITING.set(len(self._waiting))
        if self._waiting:
            self.more.set()
        else:
            self.more.clear()

    async def _rewrite(self) -> None:
        self._done = 0
        try:
            # What is added meanwhile is appended after this, by the same thread.
            await self._disk.run(self._write, [event.encode() for event in self._waiting])
        except OSError as error:
            log.warning("events not crossed out", extra=about(file=str(self._file), error=str(error)))

    def _read(self) -> list[bytes]:
        try:
            return self._file.read_bytes().splitlines()
        except FileNotFoundError:
            return []

    def _append(self, event: Lifecycle) -> None:
        with self._file.open("ab") as file:
            file.write(json.dumps(event.encode()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _write(self, events: list[dict[str, Any]]) -> None:
        """Replace the file, or just empty it: the commonest case, and a crash then only tells events again."""
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not events and self._file.exists():
            os.truncate(self._file, 0)
            return
        temporary = self._file.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._file)
