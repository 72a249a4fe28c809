"""One cell for the networker's tests: the real networker as a process; its neighbours, silk worker and enforcer, as
servers of the test that keep state and watch that the order of calls is never wrong."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.local import Health, application, serving_privately
from bus.messages import Container, Handle
from bus.records import Records

PATIENCE = 60.0
"""Seconds that a test waits for what must happen, on a slow machine too."""


def eventually(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)


class Neighbours:
    """Silk worker and enforcer, in a thread of their own so that they outlive the networker.

    `refuse` and `delay` (by target, as "/attach") make them fail; `violations` are orders that must never happen.
    `others_attach` says that addresses may be those of other plugins.
    """

    def __init__(self, run_dir: Path, records: Records) -> None:
        self._run_dir = run_dir
        self._records = records
        self.attached: dict[str, str] = {}
        self.admitted: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.violations: list[str] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.delay: dict[str, float] = {}
        self.instance = "first"
        self.interface = "s-010255030002"
        self.mac = "aa:aa:0a:ff:1e:02"
        self.before: Callable[[str], None] = lambda _: None
        self.others_attach = False
        self._turns: dict[str, asyncio.Lock] = {}
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(PATIENCE)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        self._loop.close()

    async def _serve(self) -> None:
        silk = [Route("/", self._silk), Route("/attach", self._attach, methods=["POST"])]
        silk.append(Route("/detach", self._detach, methods=["POST"]))
        enforcer = [Route("/admit", self._admit, methods=["POST"]), Route("/forget", self._forget, methods=["POST"])]
        enforcer.append(Route("/state", self._state))
        async with (
            serving_privately(application(silk, Health()), self._run_dir / "silk" / "silk.sock"),
            serving_privately(application(enforcer, Health()), self._run_dir / "enforcer" / "enforcer.sock"),
        ):
            self._started.set()
            await self._stop.wait()

    async def _begin(self, request: Request) -> tuple[dict[str, Any], Response | None]:
        target = request.url.path
        raw = await request.body()
        body: dict[str, Any] = json.loads(raw) if raw else {}
        handle = body.get("handle") or body.get("container", {}).get("handle") or ""
        self.calls.append((target, handle))
        self.before(target)
        # Calls for one handle are done in the order in which they came, as the real services do them.
        async with self._turns.setdefault(handle, asyncio.Lock()):
            await asyncio.sleep(self.delay.get(target, 0))
        if target in self.refuse:
            status, text = self.refuse[target]
            return body, JSONResponse({"error": text}, status)
        return body, None

    def _violation(self, text: str) -> None:
        self.violations.append(text)

    async def _silk(self, request: Request) -> Response:
        _, refusal = await self._begin(request)
        return refusal or JSONResponse({"overlay_subnet": "10.255.30.0/24", "mtu": 1450})

    async def _attach(self, request: Request) -> Response:
        body, refusal = await self._begin(request)
        if refusal:
            return refusal
        handle = body["handle"]
        if self._records.get(handle) is None:
            self._violation(f"{handle}: attached without a record")
        if handle not in self.attached:
            first = IPv4Address("10.255.30.2")
            # As the real worker does: what a record names is in use, whether or not there is a link.
            used = {str(record.address) for record in self._records.all()} | set(self.attached.values())
            self.attached[handle] = next(str(first + n) for n in range(250) if str(first + n) not in used)
            for other, container in self.admitted.items():
                if container["address"] == self.attached[handle]:
                    self._violation(f"{handle}: has the address of {other}, whose rules the enforcer still has")
        address = self.attached[handle]
        return JSONResponse(
            {
                "address": address,
                "interface": self.interface,
                "mac": self.mac,
                "peer_mac": "ee:ee:0a:ff:1e:02",
                "mtu": 1450,
                "gateway": "169.254.0.1",
            }
        )

    async def _detach(self, request: Request) -> Response:
        body, refusal = await self._begin(request)
        if refusal:
            return refusal
        self.attached.pop(body["handle"], None)
        return JSONResponse({})

    async def _admit(self, request: Request) -> Response:
        body, refusal = await self._begin(request)
        if refusal:
            return refusal
        container = Container.decode(body["container"])
        if not self.others_attach and self.attached.get(container.handle) != str(container.address):
            self._violation(f"{container.handle}: admitted with {container.address}, which it does not have")
        self.admitted[container.handle] = body["container"]
        return JSONResponse({"instance": self.instance, "revision": 1})

    async def _forget(self, request: Request) -> Response:
        body, refusal = await self._begin(request)
        if refusal:
            return refusal
        self.admitted.pop(body["handle"], None)
        return JSONResponse({})

    async def _state(self, request: Request) -> Response:
        _, refusal = await self._begin(request)
        return refusal or JSONResponse({"instance": self.instance, "revision": 1})


class Cell:
    """The networker's process and its neighbours, in a folder of their own.

    `enter` is a command that starts the networker in namespaces of its own.
    """

    def __init__(self, netns: str, *, neighbours: bool = True, enter: Sequence[str] = ()) -> None:
        self._enter = enter
        self.folder = Path(tempfile.mkdtemp(prefix="sbn-"))
        self.netns = netns
        self.run_dir = self.folder / "run"
        self.records = Records(self.folder / "state" / "containers")
        self.socket = self.run_dir / "networker" / "networker.sock"
        self.neighbours = Neighbours(self.run_dir, self.records)
        if neighbours:
            self.neighbours.start()
        self._process: subprocess.Popen[bytes] | None = None
        self._with_neighbours = neighbours

    def __enter__(self) -> "Cell":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if self._with_neighbours:
            self.neighbours.stop()
        if value is not None:
            print((self.folder / "networker.log").read_text()[-5000:])
        shutil.rmtree(self.folder)
        if value is None:
            assert self.neighbours.violations == []

    def start(self, *, failpoints: str = "", expect_death: bool = False, **settings: object) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SILKBUS_")},
            "SILKBUS_CELL": "cell-1",
            "SILKBUS_RUN_DIR": str(self.run_dir),
            "SILKBUS_STATE_DIR": str(self.folder / "state"),
            "SILKBUS_FAILPOINTS": failpoints,
            **{f"SILKBUS_{name.upper()}": str(value) for name, value in settings.items()},
        }
        command = [*self._enter, sys.executable, "-c", "from services.networker.agent import main; main()"]
        self.socket.unlink(missing_ok=True)
        with (self.folder / "networker.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stderr=log)
        if expect_death:
            assert self._process.wait(PATIENCE) == -signal.SIGKILL
            return
        eventually("the networker answers", lambda: self.ended or self.answers())
        assert not self.ended, (self.folder / "networker.log").read_text()

    def answers(self) -> bool:
        try:
            return self.get("/livez").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(PATIENCE)
            self._process = None

    def stop(self) -> int:
        """End it in an orderly way; its exit code."""
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(PATIENCE)
        self._process = None
        return code

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=False)
        return httpx.Client(transport=transport, base_url="http://networker")

    def get(self, target: str) -> httpx.Response:
        with self.client() as client:
            return client.get(target, timeout=PATIENCE)

    def cni(self, command: str, handle: str = "c1", **changes: Any) -> tuple[int, dict[str, Any]]:
        """One call as the shim makes it: exit code and standard output. `changes`: of the call, or its `config`."""
        config = {"cniVersion": "1.0.0", "name": "overlay", "type": "silkbus-cni", **changes.pop("config", {})}
        body = {
            "command": command,
            "container_id": handle,
            "netns": self.netns,
            "ifname": "eth0",
            "args": "",
            "path": "/opt/cni/bin",
            "config": json.dumps(config),
            **changes,
        }
        body = {name: value for name, value in body.items() if value}
        with self.client() as client:
            answer = client.post("/cni", json=body, timeout=PATIENCE).raise_for_status().json()
        return answer["exit"], json.loads(answer["stdout"] or "{}")

    def dies_of(self, command: str, handle: str = "c1") -> None:
        """A call in which the networker is to crash at an armed failpoint."""
        try:
            self.cni(command, handle)
        except httpx.HTTPError:
            assert self._process is not None
            assert self._process.wait(PATIENCE) == -signal.SIGKILL
        else:
            raise AssertionError(f"the networker survived {command}")

    def agrees(self) -> bool:
        """Whether the records, silk and the enforcer know the same containers, all of them ready."""
        records = {record.handle: record for record in self.records.all()}
        return (
            all(record.stage == "ready" for record in records.values())
            and {handle: str(record.address) for handle, record in records.items()} == self.neighbours.attached
            and set(self.neighbours.admitted) == set(self.neighbours.attached)
        )

    def is_clean(self, handle: str = "c1") -> bool:
        return (
            self.records.get(Handle(handle)) is None
            and handle not in self.neighbours.attached
            and handle not in self.neighbours.admitted
        )

    def seen(self, handle: str = "c1") -> list[str]:
        """What the neighbours were asked about a container, in order; then forgotten."""
        seen = [target for target, name in self.neighbours.calls if name == handle]
        self.neighbours.calls.clear()
        return seen
