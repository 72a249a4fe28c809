"""Two versions of the messages side by side: the one before, as recorded, and the next, as it may be."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import httpx
import msgpack
import nats
import pytest
from nats.aio.msg import Msg

from bus import subjects, wire
from bus.connection import connect
from bus.decode import Malformed
from bus.messages import AppId, CellState, Ports, Protocol, Stage, cell_name
from bus.records import Records
from bus.tables import LEASES, POLICIES, Replica
from bus.tables.cache import load
from bus.tables.follower import State
from services.silk.client import LeaseClient
from tests.bus.tables import cancel, eventually
from tests.nats_server import NatsServer
from tests.policy.server import ADMIN_TOKEN, PolicyServer, body, policy
from tests.policy.server import POLICIES as POLICIES_PATH
from tests.upgrade import recorded
from tests.upgrade.recorded import Message

DB = Ports(Protocol.TCP, 5432, 5432)
LAST = {
    ("tag", "web"): 1,
    ("tag", "db"): 2,
    ("tag", "batch"): 4,
    ("policy", "db", "web"): (DB,),
    ("policy", "db", "batch"): (DB,),
}
"""The policies when the recording ended."""
OVERLAY = IPv4Network("10.255.0.0/16")


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    server.start()
    yield server
    server.stop()


@asynccontextmanager
async def server_before(bus: NatsServer) -> AsyncIterator[nats.NATS]:
    """What a policy server of the version before answers who asks for the policies, and a client to say the rest."""
    client = await nats.connect(bus.url)
    (asked,) = recorded.said(subjects.table_fetch("policies"))

    async def answer(message: Msg) -> None:
        await client.publish(message.reply, recorded.answer(asked).data)

    await client.subscribe(subjects.table_fetch("policies"), cb=answer)
    await client.flush()
    try:
        yield client
    finally:
        await client.close()


async def test_a_cell_follows_a_server_of_the_version_before(bus: NatsServer) -> None:
    async with server_before(bus) as server, connect(bus.url, role="cell", name="cell-1") as connection:
        replica = Replica(connection, POLICIES, cache=None)
        running = asyncio.create_task(replica.run())
        try:
            await eventually(lambda: (replica.state, replica.revision) == (State.LIVE, 1), 60)
            for message in recorded.said(subjects.table_change("policies")):
                await server.publish(message.subject, message.data)
            await eventually(lambda: replica.revision == 3, 60)
            assert replica.entries == LAST
            for message in recorded.said(subjects.table_heartbeat("policies")):
                await server.publish(message.subject, message.data)
            # A digest that is another's would have it ask anew, and be answered with revision 1.
            await asyncio.sleep(0.5)
            assert replica.entries == LAST
        finally:
            await cancel(running)


def controller(bus: NatsServer, folder: Path, *, program: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    settings = {"NATS": bus.url, "DATABASE": f"sqlite:///{folder}/silk.db", "RUN_DIR": str(folder / "run")}
    environment = {f"SILKBUS_{key}": value for key, value in settings.items()}
    with (folder / "controller.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *program, "services.silk.controller"], env={**os.environ, **environment}, stderr=log
        )


async def ask(client: nats.NATS, message: Message) -> dict[str, object]:
    """Say again what was said, until somebody is there to answer."""
    async with asyncio.timeout(60):
        while True:
            try:
                answer = await client.request(message.subject, message.data, timeout=10)
            except nats.errors.NoRespondersError:
                await asyncio.sleep(0.1)
                continue
            fields: dict[str, object] = msgpack.unpackb(answer.data)
            return fields


async def test_servers_answer_cells_of_the_version_before(bus: NatsServer, tmp_path: Path) -> None:
    """All that was in an answer still is, of the same kind, under the same major version."""
    server = PolicyServer(tmp_path, bus.url)
    leasing = controller(bus, tmp_path)
    client = await nats.connect(bus.url)
    try:
        await asyncio.to_thread(server.start)
        cell = [recorded.said(subjects.lease("cell-1", verb))[0] for verb in ("acquire", "renew", "release")]
        fetches = [recorded.said(subjects.table_fetch(table))[-1] for table in ("policies", "leases")]
        for message in (*cell, *fetches):
            before, now = recorded.answer(message).fields, await ask(client, message)
            assert "error" not in now, message.subject
            kinds = {key: type(value) for key, value in before.items()}
            assert {key: type(now.get(key)) for key in kinds} == kinds, message.subject
            assert now["version"][0] == before["version"][0]  # type: ignore[index]
    finally:
        await client.close()
        server.close()
        leasing.kill()
        leasing.wait()


async def test_changes_and_heartbeats_have_what_the_version_before_looks_for(bus: NatsServer, tmp_path: Path) -> None:
    heard: dict[str, dict[str, object]] = {}
    client = await nats.connect(bus.url)

    async def hear(message: Msg) -> None:
        heard.setdefault(message.subject, msgpack.unpackb(message.data))

    await client.subscribe("silkbus.table.policies.*", cb=hear)
    await client.flush()
    server = PolicyServer(tmp_path, bus.url)
    wanted = [subjects.table_change("policies"), subjects.table_heartbeat("policies")]
    try:
        await asyncio.to_thread(server.start)
        with server.client() as api:
            await asyncio.to_thread(api.post, POLICIES_PATH, json=body(policy("web", "db")))
        await eventually(lambda: set(wanted) <= set(heard), 60)
    finally:
        server.close()
        await client.close()
    for subject in wanted:
        kinds = {key: type(value) for key, value in recorded.said(subject)[0].fields.items()}
        assert {key: type(heard[subject].get(key)) for key in kinds} == kinds


def test_the_state_of_a_cell_of_the_version_before_is_read() -> None:
    (message,) = recorded.said("silkbus.cell.cell-1.state")
    state = CellState.decode(wire.decode(message.data, message.subject))
    assert (state.revision, state.table, state.problem) == (3, "live", "")


def test_a_container_of_the_version_before_is_kept(tmp_path: Path) -> None:
    """Its record has none of the fields that were added since."""
    shutil.copy(recorded.DATA / "container.json", tmp_path / "web-0.json")
    (container,) = Records(tmp_path).all()
    assert (container.app, container.address, container.stage) == ("web", IPv4Address("10.255.1.2"), Stage.READY)
    assert (container.workload, container.forwards, container.egress) == (None, (), ())
    Records(tmp_path).put(container)
    assert Records(tmp_path).get(container.handle) == container


def test_a_record_of_the_next_version_is_read(tmp_path: Path) -> None:
    """After going back: what the next version wrote beside is ignored."""
    content = json.loads((recorded.DATA / "container.json").read_text()) | {"from_the_next_version": {"a": [1]}}
    (tmp_path / "web-0.json").write_text(json.dumps(content))
    (container,) = Records(tmp_path).all()
    assert container.app == AppId("web")


def test_a_cache_of_the_version_before_is_used(tmp_path: Path) -> None:
    shutil.copy(recorded.DATA / "policies.table", tmp_path / "policies.table")
    cached = load(tmp_path / "policies.table", "policies")
    assert cached is not None
    assert {key: POLICIES.decode(key, msgpack.unpackb(data)) for key, data in cached.content.entries.items()} == LAST


async def test_the_next_version_of_the_servers_before_a_cell_of_this_one(bus: NatsServer, tmp_path: Path) -> None:
    settings = {
        "SILKBUS_DATABASE": f"sqlite:///{tmp_path}/policy.db",
        "SILKBUS_NATS": bus.url,
    }
    server = PolicyServer(tmp_path, bus.url)
    with (tmp_path / "next.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.upgrade.next_version", "services.policy.server"],
            env={
                **os.environ,
                **settings,
                "SILKBUS_LISTEN": f"fd:{server.listener.fileno()}",
                "SILKBUS_TOKENS": str(server.tokens),
            },
            stderr=log,
            pass_fds=[server.listener.fileno()],
        )
    leasing = controller(bus, tmp_path, program=("tests.upgrade.next_version",))
    try:
        async with connect(bus.url, role="cell", name="cell-1") as connection:
            replica = Replica(connection, POLICIES, cache=None)
            leases = Replica(connection, LEASES, cache=None)
            running = [asyncio.create_task(each.run()) for each in (replica, leases)]
            headers = {"Authorization": f"bearer {ADMIN_TOKEN}"}
            async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60, trust_env=False) as api:
                # The listener is there before the server: the call waits.
                added = await api.post(POLICIES_PATH, json=body(policy("web", "db")))
                assert added.status_code == 200, (tmp_path / "next.log").read_text()
                await eventually(lambda: ("policy", "db", "web") in replica.entries, 60)
                await api.post(POLICIES_PATH, json=body(policy("web", "cache")))
                await eventually(lambda: ("policy", "cache", "web") in replica.entries, 60)
            name = cell_name("cell-1")
            client = LeaseClient(connection, name, IPv4Address("10.0.0.1"), (OVERLAY,), False)
            await eventually(lambda: leases.state == State.LIVE, 60)
            tenure = await client.renew(await client.acquire())
            await eventually(lambda: (str(tenure.lease.subnet),) in leases.entries, 60)
            for task in running:
                await cancel(task)
    finally:
        server.close()
        for each in (process, leasing):
            each.kill()
            each.wait()


async def test_a_cell_of_the_next_version_before_servers_of_this_one(bus: NatsServer, tmp_path: Path) -> None:
    server = PolicyServer(tmp_path, bus.url)
    leasing = controller(bus, tmp_path)
    cell = None
    try:
        await asyncio.to_thread(server.start)
        with server.client() as api:
            await asyncio.to_thread(api.post, POLICIES_PATH, json=body(policy("web", "db")))
        cell = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.upgrade.following", bus.url, stdout=subprocess.PIPE
        )
        assert cell.stdout is not None
        async with asyncio.timeout(60):
            assert (await cell.stdout.readline()).startswith(b"leased 10.255.")
            while b"('policy', 'db', 'web')" not in await cell.stdout.readline():
                pass
    finally:
        server.close()
        if cell is not None:
            cell.kill()
            await cell.wait()
        leasing.kill()
        leasing.wait()


def test_another_major_version_is_refused_and_said() -> None:
    data = wire.pack({"version": [wire.VERSION[0] + 1, 0], "revision": 1})
    with pytest.raises(Malformed, match=r"version: 2\.0 is not understood here \(this is 1\.x\)"):
        wire.decode(data, "policies")
