"""Denied-flow events: what this cell refused, said on the bus, in one message a second at most.

The same flow tried again and again is one item with a count. The kernel hands over at a limited rate a container, so
the count is of what was handed over, not of packets; more different flows than `denied_events_per_sec` in a second are
counted and not told.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from bus import subjects
from bus.connection import Connection
from bus.messages import CellName
from services.enforcer.traffic_file import LOST

INTERVAL = 1.0
SENT = Counter("silkbus_enforcer_denied_events_total", "Denied-flow events sent")

Key = tuple[str, str, str, int, str]
"""Source address, destination address, protocol, port, why."""


@dataclass(slots=True)
class Denied:
    """One flow that was refused, and how often within the second."""

    source: str
    source_app: str | None
    destination: str
    destination_app: str | None
    protocol: str
    port: int
    why: str
    count: int = 1

    def encode(self) -> dict[str, Any]:
        return {
            "source": {"address": self.source, "app": self.source_app},
            "destination": {"address": self.destination, "app": self.destination_app},
            "protocol": self.protocol,
            "port": self.port,
            "why": self.why,
            "count": self.count,
        }


class DeniedEvents:
    """`add` flows from the event loop; `run` it in a task. With `most` 0 nothing is said."""

    def __init__(self, connection: Connection, cell: CellName, most: int) -> None:
        self._connection = connection
        self._subject = subjects.cell(cell, "denied")
        self._most = most
        self._flows: dict[Key, Denied] = {}
        self._dropped = 0
        self._wake = asyncio.Event()

    def add(self, flow: Denied) -> None:
        if self._most == 0:
            return
        key = (flow.source, flow.destination, flow.protocol, flow.port, flow.why)
        known = self._flows.get(key)
        if known is not None:
            known.count += 1
        elif len(self._flows) < self._most:
            self._flows[key] = flow
        else:
            self._dropped += 1
            LOST.labels("events").inc()
        self._wake.set()

    async def run(self) -> None:
        """Send for ever."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(INTERVAL)
            self._wake.clear()
            flows, self._flows = self._flows, {}
            dropped, self._dropped = self._dropped, 0
            message = {"flows": [flow.encode() for flow in flows.values()], "dropped": dropped}
            if await self._connection.publish(self._subject, message):
                SENT.inc(len(flows))
            else:
                LOST.labels("events").inc(len(flows))
