"""docs/asyncapi.yaml says what is sent, all of it and nothing else: compared with what real services really send."""

import asyncio
import json
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import httpx
import msgpack
import nats
import pytest
from nats.aio.msg import Msg

from bus import subjects
from bus.connection import connect
from bus.messages import AppId, CellName, Handle, PortForward, Protocol, Workload
from bus.process import KernelThread
from bus.security_groups import SpaceId
from bus.tables import LEASES, POLICIES, SECURITY_GROUPS, Replica, Table
from services.enforcer.denied import Denied, DeniedEvents
from services.enforcer.explain import Explainer
from services.enforcer.explain_door import ExplainOnBus
from services.enforcer.reconciler import Reconciler
from services.enforcer.report import Reporter
from services.enforcer.settings import EnforcerSettings
from services.networker.announcer import Announcer
from services.networker.identity import Identity
from services.networker.outbox import Outbox, event_of
from services.networker.record import Attachment, Link
from services.policy.server import PolicySettings, serve
from services.silk.client import LeaseClient, LeaseDenied, LeaseLost
from services.silk.controller import control
from services.silk.controller_settings import ControllerSettings
from tests.bus import asyncapi
from tests.bus.tables import cancel, eventually
from tests.nats_server import NatsServer, free_port
from tests.policy.server import ADMIN_TOKEN, DELETE, TOKENS, body, policy
from tests.policy.server import POLICIES as POLICIES_PATH
from tests.policy.stubs import LOGIN, CloudControllerStub, Uaa, rule, security_group

CHANNELS = asyncapi.channels()
EXPLAIN = "/networking/v1/external/explain"
OVERLAY = IPv4Network("10.255.0.0/22")
"""Room for the leases of three cells."""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def cloud_controller() -> Iterator[CloudControllerStub]:
    uaa = Uaa()
    uaa.start()
    stub = CloudControllerStub(uaa)
    stub.groups = {
        "g": security_group("g", rule(), rule("icmp", type=8, code=-1, log=True), rule("all", description="more")),
        "h": security_group("h", running=True, running_spaces=["s1", "s2"], staging_spaces=["s1"]),
    }
    stub.start()
    yield stub
    stub.stop()
    uaa.stop()


@asynccontextmanager
async def recording(bus: NatsServer) -> AsyncIterator[list[Msg]]:
    """All that is said on the bus from now on."""
    client = await nats.connect(bus.url)
    heard: list[Msg] = []

    async def hear(message: Msg) -> None:
        heard.append(message)

    await client.subscribe(">", cb=hear)
    await client.flush()
    try:
        yield heard
    finally:
        await client.drain()


@asynccontextmanager
async def running(*coroutines: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            await cancel(task)


async def use_policies(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"bearer {ADMIN_TOKEN}"}) as client:
        some = body(policy("a", "b"), policy("a", "c", 1, 9, "udp"), policy("naïve app/%", "b"))
        async with asyncio.timeout(30):
            while True:
                try:
                    (await client.post(POLICIES_PATH, json=some)).raise_for_status()
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
        (await client.post(DELETE, json=some)).raise_for_status()
        question = {"source": "a", "destination": "b", "protocol": "tcp", "port": "1"}
        async with asyncio.timeout(30):
            while True:  # until the leases are known, so that cells are asked
                answer = await client.get(EXPLAIN, params=question)
                if answer.raise_for_status().json()["cells"] is not None:
                    return
                await asyncio.sleep(0.1)


async def use_leases(bus: NatsServer) -> None:
    async with connect(bus.url, role="cell", name="one") as connection:
        assert await connection.wait_connected(10)
        cells = [
            LeaseClient(connection, CellName(f"c{n}"), IPv4Address(f"10.0.0.{n}"), (OVERLAY,)) for n in range(1, 5)
        ]
        first, *_ = [await cell.acquire() for cell in cells[:3]]
        await cells[0].renew(first)
        with pytest.raises(LeaseDenied):
            await LeaseClient(connection, CellName("thief"), cells[0].underlay, (OVERLAY,)).acquire()
        async with asyncio.timeout(30):
            while True:  # until one of the three, which are all there are, has expired
                try:
                    last = await cells[3].acquire()
                    break
                except LeaseDenied:
                    await asyncio.sleep(0.2)
        held = {"lease": last.lease.encode()}
        assert not list(await _release(connection, cells[3], held))
        with pytest.raises(LeaseLost):
            await cells[3].renew(last)


async def _release(connection: Any, cell: LeaseClient, message: dict[str, Any]) -> list[str]:
    answer = await connection.request(subjects.lease(cell.cell, "release"), message, timeout=5)
    return [name for name in ("error", "lost") if name in answer]


async def follow(bus: NatsServer, table: Table[Any]) -> None:
    async with connect(bus.url, role="cell", name=f"of-{table.name}") as connection:
        await Replica(connection, table).run()


async def report(bus: NatsServer, folder: Path) -> None:
    """What an enforcer says of itself; its kernel is not touched before it is opened."""
    settings = EnforcerSettings(cell="one", nats=bus.url, state_dir=folder, run_dir=folder)
    async with connect(bus.url, role="cell", name="one-enforcer") as connection, asyncio.TaskGroup() as tasks:
        replica = Replica(connection, POLICIES)
        kernel = KernelThread("kernel")
        reconciler = Reconciler(settings, kernel)
        reporter = Reporter(connection, settings.cell, replica, reconciler)
        explainer = Explainer(reconciler, kernel, settings.cell)
        await ExplainOnBus(connection, explainer, settings.cell).listen()
        events = DeniedEvents(connection, CellName(settings.cell), 1)
        assert await connection.wait_connected(10)
        for port in (1, 2):
            events.add(Denied("10.255.1.2", "a", "8.8.8.8", None, "udp", port, "nothing"))
        for work in (replica.run(), reporter.run(), events.run()):
            tasks.create_task(work)


async def tell_of_containers(bus: NatsServer, folder: Path) -> None:
    """What a networker tells, from its outbox."""
    disk = KernelThread("disk")
    outbox = Outbox(folder / "events", disk)
    await outbox.load()
    link = Link(IPv4Address("10.255.1.2"))
    whole = Identity(AppId("a"), Workload.APP, SpaceId("s"), (8080,), {"org_id": "o", "log_config": '{"index": 3}'})
    forwards = (PortForward(61000, 8080), PortForward(53, 53, Protocol.UDP, IPv4Address("10.0.0.5")))
    for identity, ports in ((whole, forwards), (Identity(), ())):
        attachment = Attachment(Handle("a handle"), "/n", "eth0", "net", identity, ports, birth="0" * 16, link=link)
        for kind in ("created", "ports", "deleted"):
            await outbox.add(event_of(kind, CellName("one"), attachment))
    async with connect(bus.url, role="cell", name="one-networker") as connection:
        await Announcer(connection, CellName("one"), outbox).run()


async def test_what_is_sent_is_what_is_documented(
    bus: NatsServer, cloud_controller: CloudControllerStub, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(TOKENS))
    port = free_port()
    policies = PolicySettings(
        nats=bus.url,
        database=f"sqlite:///{tmp_path}/p.db",
        listen=f"127.0.0.1:{port}",
        tokens=tokens,
        uaa_url=cloud_controller.uaa.url,
        uaa_client=LOGIN[0],
        uaa_client_secret=LOGIN[1],
        cc_url=cloud_controller.url,
    )
    leases = ControllerSettings(
        nats=bus.url,
        database=f"sqlite:///{tmp_path}/l.db",
        overlay_network=(OVERLAY,),
        lease_expiry=4,
        subnet_rest=0,
        max_overdue_share=1.0,
        run_dir=tmp_path,
    )
    async with (
        recording(bus) as heard,
        running(serve(policies), control(leases), report(bus, tmp_path), tell_of_containers(bus, tmp_path)),
    ):
        async with running(*(follow(bus, table) for table in (POLICIES, LEASES, SECURITY_GROUPS))):
            await use_policies(f"http://127.0.0.1:{port}")
            await use_leases(bus)
            wanted = {name for name, channel in CHANNELS.items() if channel.pattern}
            await eventually(lambda: {channel_of(message).name for message in of_silkbus(heard)} >= wanted)
            await asyncio.sleep(1)
        async with running(
            *(follow(bus, table) for table in (POLICIES, LEASES, SECURITY_GROUPS))
        ):  # late ones: whole tables
            await asyncio.sleep(1)
    seen = check(heard)
    missing = {(name, message) for name, channel in CHANNELS.items() for message in channel.messages} - seen
    assert not missing, f"documented, but not sent: {sorted(missing)}"


def of_silkbus(heard: list[Msg]) -> list[Msg]:
    return [message for message in heard if message.subject.startswith("silkbus.")]


def channel_of(message: Msg) -> asyncapi.Channel:
    found = [channel for channel in CHANNELS.values() if channel.pattern and channel.pattern.fullmatch(message.subject)]
    assert len(found) == 1, f"{message.subject}: documented {len(found)} times"
    return found[0]


def check(heard: list[Msg]) -> set[tuple[str, str]]:
    """Validate every message and answer; which messages of which channels were seen."""
    seen = set()
    awaited: dict[str, asyncapi.Channel] = {}
    pieces: dict[str, dict[int, bytes]] = defaultdict(dict)
    for message in heard:
        if message.subject.startswith("silkbus."):
            channel = channel_of(message)
            if channel.answers is not None and message.reply:
                awaited[message.reply] = CHANNELS[channel.answers]
        elif message.subject in awaited:
            channel = awaited[message.subject]
        else:
            continue
        if (message.headers or {}).get("Status") == "503":
            continue  # NATS says that nobody serves it yet
        content = msgpack.unpackb(message.data)
        name = channel.message(content, message.headers or {})
        seen.add((channel.name, name))
        if name.endswith("Part"):
            parts = pieces[message.subject]
            parts[content["part"]] = content["data"]
            if len(parts) == content["parts"]:
                whole = b"".join(parts[number] for number in sorted(parts))
                pointer = f"#/components/messages/{name}/payload/properties/data/x-joined-schema"
                for plain in decompressed(whole):
                    asyncapi.validate(pointer, msgpack.unpackb(plain))
    return seen


def decompressed(data: bytes) -> Iterator[bytes]:
    """The contents of the zlib streams in `data`."""
    while data:
        engine = zlib.decompressobj()
        yield engine.decompress(data)
        assert engine.eof
        data = engine.unused_data


def test_the_document_notices_what_is_wrong() -> None:
    good = {"version": [1, 0], "epoch": "0" * 32, "revision": 1, "digest": b"0" * 16}
    pointer = "#/components/messages/heartbeat/payload"
    assert asyncapi.fits(pointer, good)
    for change in ({"digest": "0" * 16}, {"digest": b"0"}, {"version": [2, 0]}, {"revision": -1}, {"more": 1}):
        assert not asyncapi.fits(pointer, good | change), change
    change = {"version": [1, 0], "epoch": "0" * 32, "previous": 0, "revision": 1}
    pointer = "#/components/messages/policiesChange/payload"
    for entry, right in (
        ([["tag", "a"], msgpack.packb(7)], True),
        ([["tag", "a"], msgpack.packb(0)], False),
        ([["tag", "a"], None], True),
        ([["policy", "b", "a"], msgpack.packb([["tcp", 1, 2]])], True),
        ([["policy", "b", "a"], msgpack.packb([["icmp", 1, 2]])], False),
        ([["policy", "b"], msgpack.packb([["tcp", 1, 2]])], False),
    ):
        assert asyncapi.fits(pointer, change | {"changes": [entry]}) == right, entry
