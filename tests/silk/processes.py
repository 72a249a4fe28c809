"""Silk's processes in namespaces: a centre with a real bus, and cells' workers."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bus.local import Refused, Service, Unreachable
from tests.nats_server import program
from tests.silk.conftest import TestCell, sh

CENTRE = "10.77.0.250"


class Process:
    """One program in one namespace, its output in a file."""

    def __init__(self, namespace: str, log: Path, *command: str, **settings: str) -> None:
        self.command = ["ip", "netns", "exec", namespace, *command]
        self.settings = {f"SILKBUS_{name.upper()}": value for name, value in settings.items()}
        self._log = log
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, **settings: str) -> None:
        more = {f"SILKBUS_{name.upper()}": value for name, value in settings.items()}
        with self._log.open("ab") as log:
            environment = {**os.environ, **self.settings, **more}
            self._running = subprocess.Popen(self.command, env=environment, stderr=log, stdout=log)

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid

    def end_children(self) -> None:
        """Kill it and what it started: `unshare --fork` does not hand a signal on."""
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        self.stop(signal.SIGKILL)

    def send(self, number: int) -> None:
        assert self._running is not None
        self._running.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._running is not None:
            self._running.send_signal(number)
            self._running.wait(30)
            self._running = None

    def wait(self) -> int:
        assert self._running is not None
        code = self._running.wait(60)
        self._running = None
        return code


class Centre:
    """NATS and a Silk controller in the underlay's own namespace."""

    def __init__(self, namespace: str, folder: Path, **settings: str) -> None:
        sh("ip", "-n", namespace, "addr", "add", f"{CENTRE}/24", "dev", "underlay")
        self.database = folder / "silk.db"
        log = folder / "centre.log"
        self.nats = Process(namespace, log, program(), "-a", CENTRE, "-p", "4222")
        self.controller = Process(
            namespace,
            log,
            *(sys.executable, "-m", "services.silk.controller"),
            database=f"sqlite:///{self.database}",
            run_dir=str(folder / "centre"),
            nats=f"nats://{CENTRE}:4222",
            **settings,
        )

    def start(self) -> None:
        self.nats.start()
        self.controller.start()

    def count_leases(self) -> int:
        with sqlite3.connect(self.database, timeout=30) as connection:
            count: int = connection.execute("SELECT count(*) FROM leases").fetchone()[0]
            return count

    def stop(self) -> None:
        self.controller.stop(signal.SIGKILL)
        self.nats.stop(signal.SIGKILL)


class Worker:
    """A cell's silk worker, and a client of its socket."""

    def __init__(self, cell: TestCell, folder: Path, **more: str) -> None:
        settings = cell.settings
        self.cell = cell
        self.log = folder / f"{cell.name}.log"
        self.process = Process(
            cell.name,
            self.log,
            *(sys.executable, "-m", "services.silk.worker"),
            cell=settings.cell,
            underlay=str(settings.underlay),
            state_dir=str(settings.state_dir),
            run_dir=str(settings.run_dir),
            nats=f"nats://{CENTRE}:4222",
            **more,
        )
        self.socket = settings.socket("silk")

    async def call(self, method: str, target: str, body: Any = None) -> dict[str, Any]:
        service = Service("silk", self.socket)
        try:
            return await service.call(method, target, body)
        finally:
            await service.close()

    async def attach(self, handle: str, netns: str) -> dict[str, Any]:
        return await self.call("POST", "/attach", {"handle": handle, "netns": netns, "ifname": "eth0"})

    async def readyz(self) -> tuple[int, str]:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://silk") as client:
            response = await client.get("/readyz")
        return response.status_code, response.text

    async def until(self, wanted: Callable[[dict[str, Any] | str], bool], seconds: float = 30) -> None:
        """Until GET / answers what is wanted: the answer, or the error's text."""
        end = time.monotonic() + seconds
        while True:
            try:
                answer: dict[str, Any] | str = await self.call("GET", "/")
            except (Refused, Unreachable) as error:
                answer = str(error)
            if wanted(answer):
                return
            assert time.monotonic() < end, f"still {answer}; {self.log.read_text()[-3000:]}"
            await asyncio.sleep(0.05)

    async def metric(self, name: str) -> float:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://silk") as client:
            lines = (await client.get("/metrics")).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    async def ready(self) -> None:
        await self.until(lambda answer: isinstance(answer, dict))

    def log_has(self, text: str) -> bool:
        return text in self.log.read_text()


Start = Callable[..., tuple[Centre, list[Worker]]]
