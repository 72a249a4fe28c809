"""Lifecycle events: told at least once, in order, whatever is away or dies meanwhile."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import nats
import pytest

from bus.connection import connect
from bus.events import ContainerStream
from bus.messages import CellName, Handle
from bus.process import KernelThread
from services.networker import outbox as outboxes
from services.networker.outbox import Lifecycle, Outbox
from tests.nats_server import NatsServer
from tests.networker.cell import PATIENCE, Cell, eventually

STREAM = "SILKBUS_CONTAINERS"


class Told:
    """What the stream has, made by a central service of the test's own."""

    def __init__(self, server: NatsServer) -> None:
        self._server = server

    def __call__(self, count: int) -> list[tuple[str, str, dict[str, Any]]]:
        """At least `count` events: type, id, data. Waits for them."""
        return asyncio.run(self._read(count))

    async def _read(self, count: int) -> list[tuple[str, str, dict[str, Any]]]:
        async with connect(self._server.url, role="silk-controller", name="central") as connection:
            keeping = asyncio.create_task(ContainerStream(connection, readers=("reader-1",)).run())
            client = await nats.connect(self._server.url)
            jetstream = client.jetstream()
            try:
                async with asyncio.timeout(PATIENCE):
                    while True:
                        try:
                            info = await jetstream.stream_info(STREAM)
                            if info.state.messages >= count:
                                await jetstream.consumer_info(STREAM, "reader-1")
                                break
                        except nats.js.errors.NotFoundError:
                            pass
                        await asyncio.sleep(0.05)
                found = []
                for sequence in range(info.state.first_seq, info.state.last_seq + 1):
                    message = await jetstream.get_msg(STREAM, sequence)
                    headers = message.headers or {}
                    assert message.subject == f"silkbus.cell.cell-1.container.{headers['ce-type'].split('.')[3]}"
                    found.append((headers["ce-type"], headers["ce-id"], msgpack.unpackb(message.data or b"")))
                return found
            finally:
                await client.close()
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    yield server
    server.stop()


def kinds(told: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    return [kind.removeprefix("org.silkbus.container.").removesuffix(".v1") for kind, _, _ in told]


@pytest.mark.kernel
def test_what_happened_while_the_bus_was_away_is_told(cell: Cell, bus: NatsServer) -> None:
    cell.start(nats=bus.url)
    properties = {
        "policy_group_id": "a",
        "space_id": "s",
        "org_id": "o",
        "ports": "8080",
        "container_workload": "app",
        "log_config": '{"guid":"a","index":3}',
    }
    runtime = {"portMappings": [{"hostPort": 8080, "containerPort": 80}]}
    assert cell.cni("ADD", config={"metadata": properties, "runtimeConfig": runtime})[0] == 0
    assert cell.cni("ADD", "c2")[0] == 0
    cell.kill()
    cell.start(nats=bus.url)
    assert cell.cni("DEL", "c1") == (0, {})
    bus.start()
    told = Told(bus)(3)
    assert kinds(told) == ["created", "created", "deleted"]
    assert told[0][2] == {
        "version": [1, 0],
        "cell": "cell-1",
        "handle": "c1",
        "app": "a",
        "space": "s",
        "org": "o",
        "instance": 3,
        "workload": "app",
        "address": "10.255.30.2",
        "ports": [8080],
        "forwards": [{"host_port": 8080, "container_port": 80, "protocol": "tcp", "host_address": None}],
    }
    assert told[2][2]["handle"] == "c1"
    births = [identity.split(".")[2] for _, identity, _ in told]
    assert births[0] == births[2] != births[1]
    file = cell.folder / "state" / "networker" / "events"
    eventually("they are crossed out", lambda: file.read_bytes() == b"")
    cell.kill()
    cell.start(nats=bus.url)
    assert cell.cni("DEL", "c2") == (0, {})
    assert kinds(Told(bus)(4)) == ["created", "created", "deleted", "deleted"]


@pytest.mark.kernel
def test_a_start_that_was_refused_is_not_told(cell: Cell, bus: NatsServer) -> None:
    cell.start(nats=bus.url)
    cell.neighbours.refuse["/admit"] = (503, "starting")
    assert cell.cni("ADD")[0] == 1
    cell.neighbours.refuse.clear()
    assert cell.cni("ADD")[0] == 0
    bus.start()
    assert kinds(Told(bus)(1)) == ["created"]


@pytest.mark.kernel
@pytest.mark.parametrize("failpoint", ["networker.after-admit", "networker.after-ready"])
def test_a_crash_tells_nothing_wrong(cell: Cell, bus: NatsServer, failpoint: str) -> None:
    bus.start()
    cell.start(nats=bus.url, failpoints=f"{failpoint}=kill")
    cell.dies_of("ADD")
    cell.start(nats=bus.url)
    ready = failpoint == "networker.after-ready"
    told = Told(bus)(1)
    assert kinds(told) == (["created"] if ready else ["deleted"])
    assert (cell.records.get(Handle("c1")) is not None) == ready


def event(number: int) -> Lifecycle:
    return Lifecycle(f"containers.c.{number:016x}.created", "created", Handle(f"c{number}"), number, {"n": number})


async def drained(outbox: Outbox) -> list[int]:
    found = []
    while (first := outbox.first) is not None:
        found.append(int(first.data["n"]))
        await outbox.published(first)
    return found


async def test_the_outbox_outlives_its_process(tmp_path: Path) -> None:
    disk = KernelThread("disk")
    file = tmp_path / "folder" / "events"
    outbox = Outbox(file, disk)
    await outbox.load()
    for number in range(5):
        await outbox.add(event(number))
    first = outbox.first
    assert first is not None
    await outbox.published(first)
    with file.open("ab") as torn:
        torn.write(json.dumps(event(9).encode()).encode()[:-5])
    again = Outbox(file, disk)
    await again.load()
    assert await drained(again) == [0, 1, 2, 3, 4]  # the first once more: it was not crossed out on disk yet
    assert file.read_bytes() == b""
    await again.add(event(6))
    last = Outbox(file, disk)
    await last.load()
    assert await drained(last) == [6]
    disk.close()


async def test_the_outbox_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MAX_EVENTS", 10)
    disk = KernelThread("disk")
    outbox = Outbox(tmp_path / "events", disk)
    await outbox.load()
    for number in range(25):
        await outbox.add(event(number))
    assert await drained(outbox) == list(range(15, 25))
    disk.close()


async def test_a_full_disk_does_not_lose_what_can_still_be_told(tmp_path: Path) -> None:
    disk = KernelThread("disk")
    (tmp_path / "events").mkdir()
    outbox = Outbox(tmp_path / "events", disk)
    await outbox.load()
    await outbox.add(event(1))
    assert await drained(outbox) == [1]
    disk.close()


def test_names() -> None:
    attachment = outboxes.Attachment(Handle("h"), "/n", "eth0", "net", birth="ab")
    assert outboxes.event_of("created", CellName("c"), attachment).id == "containers.c.ab.created"
    assert outboxes.event_of("ports", CellName("c"), attachment).id == "containers.c.ab.ports.0"


@pytest.mark.parametrize("text", [None, 7, "", "{", "[]", "7", '{"index": "3"}', '{"index": -1}', '{"index": true}'])
def test_log_configs_without_an_index(text: object) -> None:
    identity = outboxes.Attachment(Handle("h"), "/n", "eth0", "net").identity
    identity = type(identity)(metadata={"log_config": text})
    attachment = outboxes.Attachment(Handle("h"), "/n", "eth0", "net", identity)
    assert outboxes.event_of("created", CellName("c"), attachment).data["instance"] is None
