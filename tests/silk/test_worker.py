"""The worker and the controller as processes in namespaces: leases over a real bus, attaching over the socket."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bus.local import Refused, Service, Unreachable
from services.silk.namespace import opened
from tests.nats_server import program
from tests.silk.conftest import Namespaces, TestCell, eventually, reaches, sh
from tests.silk.traffic import UdpStream

pytestmark = pytest.mark.kernel

CENTRE = "10.77.0.250"


class Process:
    """One program in one namespace, its output in a file."""

    def __init__(self, namespace: str, log: Path, *command: str, **settings: str) -> None:
        self._command = ["ip", "netns", "exec", namespace, *command]
        self._settings = {f"SILKBUS_{name.upper()}": value for name, value in settings.items()}
        self._log = log
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, **settings: str) -> None:
        more = {f"SILKBUS_{name.upper()}": value for name, value in settings.items()}
        with self._log.open("ab") as log:
            environment = {**os.environ, **self._settings, **more}
            self._running = subprocess.Popen(self._command, env=environment, stderr=log, stdout=log)

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
        log = folder / "centre.log"
        self.nats = Process(namespace, log, program(), "-a", CENTRE, "-p", "4222")
        self.controller = Process(
            namespace,
            log,
            *(sys.executable, "-m", "services.silk.controller"),
            database=f"sqlite:///{folder / 'silk.db'}",
            run_dir=str(folder / "centre"),
            nats=f"nats://{CENTRE}:4222",
            **settings,
        )

    def start(self) -> None:
        self.nats.start()
        self.controller.start()

    def stop(self) -> None:
        self.controller.stop(signal.SIGKILL)
        self.nats.stop(signal.SIGKILL)


class Worker:
    """A cell's silk worker, and a client of its socket."""

    def __init__(self, cell: TestCell, folder: Path) -> None:
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

    async def ready(self) -> None:
        await self.until(lambda answer: isinstance(answer, dict))

    def log_has(self, text: str) -> bool:
        return text in self.log.read_text()


Start = Callable[..., tuple[Centre, list[Worker]]]


@pytest.fixture
def start(make_cell: Callable[[int], TestCell], namespaces: Namespaces, tmp_path: Path) -> Iterator[Start]:
    """Starts a centre with these settings, and COUNT cells' workers."""
    made: list[Centre | Process] = []

    def begin(count: int = 1, *, centre_up: bool = True, **settings: str) -> tuple[Centre, list[Worker]]:
        centre = Centre(namespaces.names[0], tmp_path, **settings)
        made.append(centre)
        if centre_up:
            centre.start()
        workers = [Worker(make_cell(number), tmp_path) for number in range(1, count + 1)]
        for worker in workers:
            made.append(worker.process)
            worker.process.start()
        return centre, workers

    yield begin
    for each in made:
        each.stop()


async def test_two_cells_meet_and_a_restart_is_not_noticed(start: Start) -> None:
    _, (first, second) = start(2)
    await first.ready()
    await second.ready()
    source, target = first.cell.container(), second.cell.container()
    await first.attach("client", source)
    server = await second.attach("server", target)
    address = server["address"]
    await asyncio.to_thread(eventually, lambda: reaches(source.rpartition("/")[2], address))
    with opened(source) as here, opened(target) as there, UdpStream(here, there, address) as stream:
        await asyncio.to_thread(stream.wait_for, 100)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for worker in (first, second):
                worker.process.stop(number)
                worker.process.start()
                await worker.ready()
        assert await second.attach("server", target) == server
        await asyncio.to_thread(stream.wait_for, stream.received + 100)
    assert stream.sent == stream.received
    await second.call("POST", "/detach", {"handle": "server", "netns": target, "ifname": "eth0"})
    assert not reaches(source.rpartition("/")[2], address, timeout=1)


async def test_readiness_says_what_is_missing(start: Start) -> None:
    centre, (worker,) = start(centre_up=False)
    await worker.until(lambda answer: "no lease yet: no connection to NATS" in answer)
    status, text = await worker.readyz()
    assert status == 503
    assert "lease: no lease yet: no connection to NATS" in text
    assert "overlay: no lease yet" in text
    centre.start()
    end = time.monotonic() + 30
    while await worker.readyz() != (200, "lease: ok\noverlay: ok\ntable: ok\n"):
        assert time.monotonic() < end, await worker.readyz()
        await asyncio.sleep(0.1)


async def test_another_overlay_network_is_refused(start: Start) -> None:
    _, (worker,) = start(overlay_network="10.100.0.0/16")
    await worker.until(lambda answer: "10.100.1.0/24, which is not in the overlay network 10.255.0.0/16" in answer)


async def test_a_cell_goes_on_without_bus_and_centre(start: Start) -> None:
    centre, (worker,) = start()
    await worker.ready()
    centre.stop()
    first = await worker.attach("web-1", worker.cell.container())
    worker.process.stop(signal.SIGKILL)
    worker.process.start()
    await worker.ready()
    second = await worker.attach("web-2", worker.cell.container())
    assert reaches(worker.cell.name, first["address"])
    assert reaches(worker.cell.name, second["address"])


async def test_a_cold_cell_waits_for_the_centre(start: Start) -> None:
    centre, (worker,) = start(centre_up=False)
    await worker.until(lambda answer: "no lease yet" in answer)
    with pytest.raises(Refused, match="no lease yet") as refused:
        await worker.attach("web-1", worker.cell.container())
    assert refused.value.status == 503
    centre.start()
    await worker.ready()


async def test_a_cell_that_cannot_renew_fences_itself_and_comes_back(start: Start) -> None:
    centre, (worker,) = start(lease_expiry="4")
    await worker.ready()
    await worker.attach("web-1", worker.cell.container())
    centre.stop()
    await worker.until(lambda answer: "fenced: the lease could not be renewed" in answer)
    await asyncio.to_thread(eventually, lambda: "state DOWN" in worker.cell.sh("ip", "link", "show", "silk-vtep"))
    with pytest.raises(Refused, match="fenced"):
        await worker.attach("web-2", worker.cell.container())
    centre.start()
    await worker.ready()
    assert "web-1" in worker.cell.sh("ip", "link", "show", "s-010255001002")
    await worker.attach("web-2", worker.cell.container())


async def test_a_lost_lease_is_not_used(start: Start, tmp_path: Path) -> None:
    centre, (worker,) = start(lease_expiry="4")
    await worker.ready()
    await worker.attach("web-1", worker.cell.container())
    centre.controller.stop()
    for file in tmp_path.glob("silk.db*"):
        file.unlink()
    centre.controller.start()
    # The new database gives the same subnet again: fenced, and back.
    await asyncio.to_thread(eventually, lambda: worker.log_has("the lease is lost"))
    await worker.ready()


async def test_killed_after_the_commit_the_cell_gets_that_lease(start: Start) -> None:
    centre, (worker,) = start(centre_up=False)
    centre.nats.start()
    centre.controller.start(failpoints="silk.lease.after-commit=kill")
    assert await asyncio.to_thread(centre.controller.wait) == -signal.SIGKILL
    centre.controller.start()
    await worker.until(lambda answer: isinstance(answer, dict) and answer["overlay_subnet"] == "10.255.1.0/24")


async def test_what_is_malformed_is_refused(start: Start) -> None:
    _, (worker,) = start()
    await worker.ready()
    good = {"handle": "a", "netns": "/absent", "ifname": "eth0"}
    for body, status, error in (
        ({**good, "handle": ""}, 400, "handle: must not be empty"),
        ({**good, "handle": "a\n"}, 400, "cannot be printed"),
        ({**good, "handle": "a" * 300}, 400, "1 to 200 characters"),
        ({**good, "netns": None}, 400, "netns: missing"),
        ({**good, "ifname": "a-name-of-18-chars"}, 400, "not an interface name"),
        ({**good, "ifname": "a/b"}, 400, "not an interface name"),
        (good, 400, "'/absent' cannot be opened"),
    ):
        with pytest.raises(Refused, match=error) as refused:
            await worker.call("POST", "/attach", body)
        assert refused.value.status == status
