"""What rules log of traffic, said in words: one JSON line a flow, and events of flows that were refused.

The lines have the form that the original's iptables-logger writes (contract/cell.md 7.2), so that what reads those goes
on: `message` says direction and verdict, `data` the container that it is about (`source` of what leaves, `destination`
of what comes in) and the packet. Ours also say `data.reason`, which kind of rule decided, and between containers both
ends, as far as this cell knows them: of a container on another cell, the app, by its tag.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from ipaddress import IPv4Address
from typing import Any

from prometheus_client import Counter
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from bus.log import about
from bus.messages import AppId, Container
from bus.process import KernelThread
from services.enforcer.denied import Denied, DeniedEvents
from services.enforcer.logged import Verdict, Why, understand
from services.enforcer.model import Model
from services.enforcer.nflog import GroupTaken, Logged, NflogSocket
from services.enforcer.rules import TAG_MASK
from services.enforcer.traffic_file import LOST, TrafficFile
from services.enforcer.traffic_settings import TrafficSettings

log = logging.getLogger(__name__)

AT_ONCE = 64
"""Packets that are read before the event loop goes on with something else: 3 ms."""
RETRY_MAX = 60.0
SOURCE = "cfnetworking.iptables"
"""As the original names its lines."""
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP"}

FLOWS = Counter(
    "silkbus_enforcer_logged_total", "Packets handed over by log rules, which limit their rate", ["verdict", "reason"]
)


class Traffic:
    """Reads one NFLOG group of the cell's namespace. `run` it in a task; it never ends for want of the group."""

    def __init__(self, settings: TrafficSettings, model: Model, kernel: KernelThread, events: DeniedEvents) -> None:
        self._settings = settings
        self._names = Names(model, settings.cell)
        self._kernel = kernel
        self._events = events
        self._file = TrafficFile(settings.traffic_log)
        self.problem: str | None = "not reading yet"
        """Why flows are not logged, or None."""

    async def run(self) -> None:
        """Log for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._file.run())
            tasks.create_task(self._events.run())
            tasks.create_task(self._read())

    async def _read(self) -> None:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type((GroupTaken, OSError)),
            wait=wait_exponential(0.5, max=RETRY_MAX),
            before_sleep=self._say,
        ):
            with attempt:
                # Made in the kernel thread, which is in the cell's namespace wherever the rest of the process is.
                reader = await self._kernel.run(NflogSocket, self._settings.nflog_group)
                try:
                    self.problem = None
                    await self._reading(reader)
                finally:
                    reader.close()

    async def _reading(self, reader: NflogSocket) -> None:
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()
        lost = 0

        def readable() -> None:
            nonlocal lost
            try:
                packets = reader.read(AT_ONCE)
            except OSError as error:
                if not failed.done():
                    failed.set_exception(error)
                return
            if reader.lost != lost:
                LOST.labels("kernel").inc(reader.lost - lost)
                lost = reader.lost
            for packet in packets:
                self.take(packet)

        loop.add_reader(reader.fileno(), readable)
        try:
            await failed
        finally:
            loop.remove_reader(reader.fileno())

    def _say(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.problem = str(error)
        log.error("flows are not logged, trying again", extra=about(error=self.problem, attempt=state.attempt_number))

    def take(self, packet: Logged) -> None:
        """Say what is to be said of one packet."""
        understood = understand(packet.prefix)
        if understood is None:
            return
        verdict, why = understood
        FLOWS.labels(str(verdict), str(why)).inc()
        if verdict is Verdict.DENIED:
            self._events.add(self._names.denied(packet, why))
        if verdict is not Verdict.DENIED or self._settings.log_denied:
            if self._file.full:  # dropped before it is made, which is what costs
                LOST.labels("file").inc()
            else:
                self._file.put(self._names.line(packet, verdict, why))


class Names:
    """Says whose the addresses are."""

    def __init__(self, model: Model, cell: str) -> None:
        self._model = model
        self._cell = cell
        self._apps: tuple[int, dict[int, AppId]] = (-1, {})

    def line(self, packet: Logged, verdict: Verdict, why: Why) -> bytes:
        """The line of a packet."""
        source, destination = self._model.container_at(packet.source), self._model.container_at(packet.destination)
        direction = "ingress" if destination is not None else "egress"
        allowed = verdict is Verdict.ALLOWED
        data: dict[str, Any] = {}
        if destination is not None:
            data["destination"] = self._container(destination)
            tag = packet.mark & TAG_MASK
            if source is not None:
                data["source"] = self._container(source)
            elif tag:
                data["source"] = {"app_guid": self._apps_by_tag().get(tag, "")}
        else:
            data["source"] = self._container(source)
        data["packet"] = {
            "direction": direction,
            "allowed": allowed,
            "src_ip": str(packet.source),
            "src_port": packet.source_port,
            "dst_ip": str(packet.destination),
            "dst_port": packet.port,
            "protocol": PROTOCOLS.get(packet.protocol, str(packet.protocol)),
            "mark": f"{packet.mark:#x}" if packet.mark else "",
            "icmp_type": packet.icmp_type,
            "icmp_code": packet.icmp_code,
        }
        data["reason"] = str(why) if verdict is not Verdict.DRY else f"{why}, on trial"
        line = {
            "timestamp": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": "info",
            "source": SOURCE,
            "message": f"{SOURCE}.{direction}-{'allowed' if allowed else 'denied'}",
            "data": data,
        }
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"

    def denied(self, packet: Logged, why: Why) -> Denied:
        """A packet that was refused, as it is said on the bus."""
        return Denied(
            str(packet.source),
            self._app(packet.source, packet.mark & TAG_MASK),
            str(packet.destination),
            self._app(packet.destination, 0),
            PROTOCOLS.get(packet.protocol, str(packet.protocol)).lower(),
            packet.port,
            str(why),
        )

    def _app(self, address: IPv4Address, tag: int) -> str | None:
        container = self._model.container_at(address)
        if container is not None:
            return container.app
        return self._apps_by_tag().get(tag) if tag else None

    def _apps_by_tag(self) -> Mapping[int, AppId]:
        revision, apps = self._apps
        if revision != self._model.revision:
            apps = {int(tag): app for app, tag in self._model.tags.items()}
            self._apps = (self._model.revision, apps)
        return apps

    def _container(self, container: Container | None) -> dict[str, str]:
        found: Callable[..., Any] = {}.get if container is None else container.metadata.get

        def text(name: str) -> str:
            value = found(name)
            return value if isinstance(value, str) else ""

        return {
            "container_id": "" if container is None else container.handle,
            "app_guid": text("app_id") or (container.app if container is not None and container.app else ""),
            "space_guid": (container.space if container is not None and container.space else "") or text("space_id"),
            "organization_guid": text("org_id"),
            "host_ip": str(self._model.underlay_of(self._cell) or ""),
            "host_guid": self._cell,
        }
