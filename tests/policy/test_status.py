"""Realisation and event streams: a real policy server, lease controller and bus; cells that say what they enforce."""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import httpx
import pytest

from bus import subjects
from bus.connection import BusAway, Connection, NoAnswer, connect
from bus.messages import CellName, CellState, Revision
from services.silk.client import LeaseClient, LeaseDenied
from services.silk.controller import control
from services.silk.controller_settings import ControllerSettings
from tests.bus.tables import cancel, eventually
from tests.nats_server import NatsServer
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, WRITE_TOKEN, PolicyServer, body, policy

STATUS = "/networking/v1/external/status"
FOLLOW = f"{STATUS}/follow"
EVENTS = "/networking/v1/external/events"
OVERLAY = IPv4Network("10.255.0.0/16")
WAIT = 60.0


class Cells:
    """Cells with leases, that say what the test has them say."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connections: dict[str, Connection] = {}
        self.epoch = ""

    @asynccontextmanager
    async def cell(self, name: str, number: int) -> AsyncIterator[None]:
        async with connect(self.url, role="cell", name=name) as connection:
            assert await connection.wait_connected(WAIT)
            client = LeaseClient(connection, CellName(name), IPv4Address(f"10.0.0.{number}"), (OVERLAY,))
            while True:
                try:
                    await client.acquire()
                    break
                except (BusAway, NoAnswer, LeaseDenied):
                    await asyncio.sleep(0.2)
            self.connections[name] = connection
            yield

    async def say(self, name: str, revision: int, *, epoch: str | None = None, problem: str = "") -> None:
        state = CellState(self.epoch if epoch is None else epoch, Revision(revision), "live", problem)
        assert await self.connections[name].publish(subjects.cell(name, "state"), state.encode())


class Follower:
    """Reads server-sent events."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> tuple[str, Any, str | None]:
        """Kind, data and id of the next event."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(WAIT):
            async for line in self._lines:
                name, _, value = line.partition(": ")
                if line and not line.startswith(":"):
                    fields[name] = value
                elif not line and "event" in fields:
                    return fields["event"], json.loads(fields["data"]), fields.get("id")
        raise EOFError

    async def ended(self) -> bool:
        try:
            await self.next()
        except (EOFError, httpx.HTTPError):
            return True
        return False


@asynccontextmanager
async def following(server: PolicyServer, path: str, last: str | None = None) -> AsyncIterator[Follower]:
    headers = {"Authorization": f"bearer {ADMIN_TOKEN}", **({"Last-Event-ID": last} if last else {})}
    async with (
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=WAIT, trust_env=False) as client,
        client.stream("GET", path) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Follower(response)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def world(bus: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[PolicyServer, Cells]]:
    server = PolicyServer(tmp_path, bus.url)
    controller = asyncio.create_task(
        control(
            ControllerSettings(
                nats=bus.url,
                database=f"sqlite:///{tmp_path / 'silk.db'}",
                run_dir=tmp_path / "run",
                overlay_network=(OVERLAY,),
            )
        )
    )
    try:
        await asyncio.to_thread(server.start)
        cells = Cells(bus.url)
        async with cells.cell("a", 1), cells.cell("b", 2):
            with server.client() as api:
                await eventually(lambda: api.get(STATUS).json()["leases_known"], WAIT)
                await eventually(lambda: total(api.get(STATUS).json()) == 2, WAIT)
            with sqlite3.connect(tmp_path / "policy.db") as database:
                ((cells.epoch,),) = database.execute("SELECT epoch FROM table_head WHERE name = 'policies'")
            yield server, cells
    finally:
        server.close()
        await cancel(controller)


def total(status: dict[str, Any]) -> int:
    return sum(status[name]["count"] for name in ("enforcing", "behind", "unreachable"))


async def test_status_tells_who_enforces_and_who_does_not(world: tuple[PolicyServer, Cells]) -> None:
    server, cells = world
    with server.client() as api, server.client(WRITE_TOKEN) as developer:
        for number in (1, 2):
            api.post(POLICIES, json=body(policy("x", f"y{number}"))).raise_for_status()
        await cells.say("a", 2)
        await cells.say("b", 1, problem="no iptables")
        await eventually(lambda: api.get(STATUS).json()["enforcing"]["count"] == 1, WAIT)
        await eventually(lambda: api.get(STATUS).json()["behind"]["cells"][0]["revision"] == 1, WAIT)
        status = api.get(STATUS).json()
        assert (status["revision"], status["head"], status["realised"]) == (2, 2, False)
        assert status["enforcing"] == {"count": 1, "cells": ["a"]}
        assert status["behind"] == {"count": 1, "cells": [{"cell": "b", "revision": 1, "problem": "no iptables"}]}
        assert status["unreachable"] == {"count": 0, "cells": []}
        assert api.get(STATUS, params={"revision": 1}).json()["realised"]
        seen = developer.get(STATUS).json()
        assert seen["behind"] == {"count": 1}
        # Of a database that is no more, no revision counts.
        await cells.say("a", 2, epoch="0" * 32)
        await eventually(lambda: api.get(STATUS, params={"revision": 1}).json()["behind"]["count"] == 1, WAIT)
        assert api.get(STATUS).json()["behind"]["cells"][0] == {"cell": "a", "revision": None, "problem": None}


async def test_a_cell_that_is_ahead_of_a_restored_database_is_behind(world: tuple[PolicyServer, Cells]) -> None:
    server, cells = world
    with server.client() as api:
        api.post(POLICIES, json=body(policy("x", "y1"))).raise_for_status()
        with sqlite3.connect(server.folder / "policy.db") as live, sqlite3.connect(":memory:") as dump:
            live.backup(dump)
            api.post(POLICIES, json=body(policy("x", "y2"))).raise_for_status()
            await cells.say("a", 2)
            await eventually(lambda: api.get(STATUS).json()["enforcing"]["count"] == 1, WAIT)
            dump.backup(live)
        await eventually(lambda: api.get(STATUS).json()["head"] == 1, WAIT)
        assert {"cell": "a", "revision": None, "problem": None} in api.get(STATUS).json()["behind"]["cells"]
        await cells.say("a", 1)
        await eventually(lambda: api.get(STATUS).json()["enforcing"]["cells"] == ["a"], WAIT)


async def test_a_cell_that_falls_silent_is_unreachable_and_comes_back(world: tuple[PolicyServer, Cells]) -> None:
    server, cells = world
    with server.client() as api:
        api.post(POLICIES, json=body(policy("x", "y"))).raise_for_status()

        async def keep_alive() -> None:
            while True:
                await cells.say("a", 1)
                await asyncio.sleep(1)

        alive = asyncio.create_task(keep_alive())
        await cells.say("b", 0)
        begun = time.monotonic()
        await eventually(lambda: api.get(STATUS).json()["unreachable"]["count"] == 1, WAIT)
        assert time.monotonic() - begun > 5
        status = api.get(STATUS).json()
        assert status["unreachable"]["cells"][0]["cell"] == "b"
        assert status["unreachable"]["cells"][0]["silent_seconds"] >= 10
        assert status["realised"]
        await cells.say("b", 1)
        await eventually(lambda: api.get(STATUS).json()["enforcing"]["count"] == 2, WAIT)
        await cancel(alive)


async def test_following_ends_when_all_live_cells_enforce(world: tuple[PolicyServer, Cells]) -> None:
    server, cells = world
    with server.client() as api:
        answer = api.post(POLICIES, json=body(policy("x", "y")))
    revision = int(answer.headers["X-Silkbus-Revision"])
    async with following(server, f"{FOLLOW}?revision={revision}") as follower:
        kind, status, _ = await follower.next()
        assert (kind, status["behind"]["count"]) == ("status", 2)
        await cells.say("a", revision)
        while status["enforcing"]["count"] < 1:
            kind, status, _ = await follower.next()
        assert (kind, status["realised"]) == ("status", False)
        await cells.say("b", revision)
        while kind == "status":
            kind, status, _ = await follower.next()
        assert kind == "realised"
        assert status["enforcing"]["cells"] == ["a", "b"]
        assert await follower.ended()


async def test_events_come_at_once_and_none_is_lost_by_who_comes_back(world: tuple[PolicyServer, Cells]) -> None:
    server, cells = world
    with server.client() as api:
        api.post(POLICIES, json=body(policy("x", "before"))).raise_for_status()
        async with following(server, EVENTS) as follower:
            await asyncio.sleep(0.5)  # the stream begins with the present
            api.post(POLICIES, json=body(policy("x", "y"), policy("x", "z"))).raise_for_status()
            kind, first, number = await follower.next()
            assert (kind, first["id"], first["type"]) == ("policy.added", number, "org.silkbus.policy.added.v1")
            assert first["data"] == {"source": "x", "destination": "y", "ports": ["tcp", 8080, 8080]}
            async with cells.cell("c", 3):
                assert (await follower.next())[1]["data"]["destination"] == "z"
                kind, lease, none = await follower.next()
                assert (kind, lease["data"]["cell"], none) == ("lease.acquired", "c", None)
        api.post(DELETE, json=body(policy("x", "y"))).raise_for_status()
        async with following(server, EVENTS, number) as follower:
            assert (await follower.next())[1]["data"]["destination"] == "z"
            kind, removed, _ = await follower.next()
            assert (kind, removed["data"]["destination"]) == ("policy.removed", "y")
        for unknown in ("nonsense", f"policies.1.0.{'0' * 16}", f"policies.99.0.{'0' * 16}"):
            async with following(server, EVENTS, unknown) as follower:
                assert await follower.next() == ("reset", {"revision": 3}, None)


async def test_streams_end_with_the_client_and_with_the_server(world: tuple[PolicyServer, Cells]) -> None:
    server, _ = world

    def streams(api: httpx.Client) -> float:
        line = next(line for line in api.get("/metrics").text.splitlines() if line.startswith("silkbus_api_streams "))
        return float(line.split()[1])

    with server.client() as api:
        async with following(server, EVENTS):
            await eventually(lambda: streams(api) == 1, WAIT)
        await eventually(lambda: streams(api) == 0, WAIT)
    async with following(server, EVENTS) as follower:
        await asyncio.sleep(0.5)
        begun = time.monotonic()
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        assert await follower.ended()
        assert await stopping == 0
        assert time.monotonic() - begun < 30


async def test_a_cell_cannot_fill_the_memory_nor_break_the_listener(world: tuple[PolicyServer, Cells]) -> None:
    server, cells = world
    with server.client() as api:
        connection = cells.connections["a"]
        for data in (b"", b"\xff", b"\x80"):
            await connection.publish_bytes(subjects.cell("a", "state"), data)
        await connection.publish(subjects.cell("a", "state"), {"revision": "x", "table": "live"})
        await cells.say("a", 0)
        await eventually(lambda: api.get(STATUS).json()["enforcing"]["count"] == 1, WAIT)
