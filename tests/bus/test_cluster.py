"""A cluster of three real nats-servers, with the certificates and permissions that `silkbus nats-config` wrote.

Losing any one of them, killed or gone silent, loses nothing and stops nothing.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import nats.errors
import pytest

from bus import subjects
from bus.connection import connect
from bus.events.relay import Relay
from bus.messages import Revision
from bus.permissions import CELL, POLICY_SERVER, READER
from bus.wire import unpack
from tests.bus.guarded import NOTES_AS_POLICIES, Guarded, thief
from tests.bus.tables import Centre, Follower, cancel, centre, eventually, follower

FAILOVER_SECONDS = 60
"""What a test allows on a busy machine; it takes less than one second after a kill, five to ten when a server hangs."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded.make(tmp_path, count=3)
    made.start()
    yield made
    made.stop()


@dataclass
class House:
    here: Centre
    cells: list[Follower]
    written: int = 0

    async def write(self) -> None:
        self.written += 1
        await self.here.write(**{f"note-{self.written}": str(self.written)})

    def arrived(self) -> bool:
        return all(len(cell.replica.entries) == self.written for cell in self.cells)


@asynccontextmanager
async def house(cluster: Guarded, folder: Path) -> AsyncIterator[House]:
    """A policy server with its table, and both cells following it."""
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(
            centre(
                cluster.url,
                f"sqlite:///{folder}/notes.db",
                table=NOTES_AS_POLICIES,
                role=POLICY_SERVER,
                credentials=cluster.credentials(POLICY_SERVER),
            )
        )
        cells = [
            await stack.enter_async_context(
                follower(cluster.url, table=NOTES_AS_POLICIES, name=name, credentials=cluster.credentials(CELL, name))
            )
            for name in cluster.layout.cells
        ]
        made = House(here, cells)
        await made.write()
        await eventually(made.arrived, FAILOVER_SECONDS)
        yield made


async def writing_on(made: House, seconds: float) -> float:
    """Write again and again for a while; then the longest time for which a cell saw nothing new, in seconds."""
    longest, seen, since = 0.0, made.cells[0].replica.revision, time.monotonic()
    end = since + seconds
    while time.monotonic() < end:
        await made.write()
        await asyncio.sleep(0.05)
        revision, now = min(cell.replica.revision for cell in made.cells), time.monotonic()
        if revision > seen:
            longest, seen, since = max(longest, now - since), revision, now
    return longest


async def test_losing_any_one_server_loses_nothing_and_stops_nothing(cluster: Guarded, tmp_path: Path) -> None:
    async with house(cluster, tmp_path) as made:
        for server in cluster.servers:
            server.stop()
            longest = await writing_on(made, 3)
            print(f"changes stood still for {longest:.2f} s after the kill")
            await eventually(made.arrived, FAILOVER_SECONDS)
            server.start()
        await eventually(made.arrived, FAILOVER_SECONDS)
        for cell in made.cells:
            assert cell.replica.entries == await made.here.notes.content()
            assert [update.revision for update in cell.updates] == sorted(update.revision for update in cell.updates)


async def test_a_server_that_hangs_is_left(cluster: Guarded, tmp_path: Path) -> None:
    async with house(cluster, tmp_path) as made:
        for server in cluster.servers:
            begun = time.monotonic()
            server.pause()
            try:
                await made.write()
                await eventually(made.arrived, FAILOVER_SECONDS)
                await asyncio.sleep(0.5)
                await made.write()
                await eventually(made.arrived, FAILOVER_SECONDS)
                print(f"changes came through {time.monotonic() - begun:.1f} s after the server hung")
            finally:
                server.resume()
        for cell in made.cells:
            assert cell.replica.entries == await made.here.notes.content()


async def test_events_are_kept_by_three_and_survive_the_loss_of_each(cluster: Guarded, tmp_path: Path) -> None:
    async with (
        house(cluster, tmp_path) as made,
        connect(
            cluster.url, role=POLICY_SERVER, name="relay", credentials=cluster.credentials(POLICY_SERVER)
        ) as connection,
    ):
        ledger = made.here.notes.ledger
        relay = asyncio.create_task(Relay(connection, ledger, readers=cluster.layout.readers, replicas=3).run())
        for server in cluster.servers:
            server.stop()
            await made.write()
            await asyncio.sleep(1)
            server.start()
            await made.write()
        wanted = [event["data"]["name"] for entry in await ledger.log_from(Revision(1)) for event in entry.events]
        assert len(wanted) == made.written == 7
        assert await read(cluster, len(wanted)) == wanted
        await cancel(relay)


async def read(cluster: Guarded, count: int) -> list[str]:
    """What a reader gets that fetches and acknowledges `count` events, as long as it takes."""
    names: list[str] = []
    deadline = time.monotonic() + FAILOVER_SECONDS
    async with thief(cluster, READER, "r1") as reader:
        stream = subjects.event_stream(NOTES_AS_POLICIES.name)
        events = await reader.client.jetstream().pull_subscribe_bind(consumer="r1", stream=stream)
        while len(names) < count and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            with suppress(nats.errors.Error):  # the server that it asks has only just started
                for message in await events.fetch(count - len(names), timeout=2):
                    names.append(unpack(message.data, message.subject)["name"])
                    await message.ack()
    return names


async def test_a_server_that_is_dead_from_the_start_costs_one_attempt(cluster: Guarded) -> None:
    """Not even one that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = f"nats://127.0.0.1:{silent.getsockname()[1]},nats://127.0.0.1:1,{cluster.servers[0].url}"
        for _ in range(5):
            async with connect(urls, role=CELL, name="cell-1", credentials=cluster.credentials(CELL, "cell-1")) as one:
                assert await one.wait_connected(FAILOVER_SECONDS)


def test_a_client_certificate_opens_no_route(cluster: Guarded) -> None:
    """Whoever speaks as a server may say anything as anyone."""
    for role, name in ((CELL, "cell-1"), (POLICY_SERVER, "")):
        stolen = cluster.credentials(role, name)
        context = ssl.create_default_context(cafile=cluster.layout.out / "authority" / "routes-ca.crt")
        context.load_cert_chain(stolen.cert, stolen.key)
        said = try_route(cluster.layout.servers[0].route_port, context)
        assert said == b"", said
    own = cluster.layout.server_folder(cluster.layout.servers[1])
    context = ssl.create_default_context(cafile=own / "routes-ca.crt")
    context.load_cert_chain(own / "route.crt", own / "route.key")
    assert b"INFO" in try_route(cluster.layout.servers[0].route_port, context)


def try_route(port: int, context: ssl.SSLContext) -> bytes:
    """What a server says after TLS to one that comes as another server; nothing when it ends the connection."""
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
                wrapped.settimeout(5)
                wrapped.sendall(b'CONNECT {"name":"n9","cluster":"silkbus","headers":true}\r\nPING\r\n')
                said = b""
                while b"INFO" not in said:
                    data = wrapped.recv(4096)
                    if not data:
                        break
                    said += data
                return said
        except (ssl.SSLError, ConnectionError, TimeoutError):
            return b""
