"""The example subscriber of docs/, as its own process: it prints each event once, whatever the bus does."""

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from bus.connection import connect
from bus.credentials import Credentials
from bus.database import open_database
from bus.events import Relay
from bus.ledger import Ledger
from bus.messages import AppId, Policy, Ports, Protocol
from bus.permissions import POLICY_SERVER, READER
from services.policy.schema import MIGRATIONS
from services.policy.store import Store
from services.policy.tag_pool import TagPool
from tests.bus.guarded import Guarded
from tests.bus.tables import cancel, eventually
from tests.nats_server import NatsServer

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "subscribe.py"


class Subscriber:
    def __init__(self, url: str, reader: str, folder: Path, *certificates: str) -> None:
        self.output, self.done = folder / "output", folder / "done.db"
        command = [sys.executable, "-u", str(EXAMPLE), url, reader, str(self.done), *certificates]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output)

    def lines(self) -> list[str]:
        """What it printed, without the times."""
        assert self.process.poll() is None, "the example has ended"
        return [line.partition(" ")[2] for line in self.output.read_text().splitlines()]

    def handled(self) -> int:
        """How many events it has noted as handled; it prints them a moment before."""
        with closing(sqlite3.connect(self.done)) as done:
            (count,) = done.execute("SELECT count(*) FROM done").fetchone()
        return int(count)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@asynccontextmanager
async def policies(url: str, folder: Path, reader: str, credentials: Credentials | None = None) -> AsyncIterator[Store]:
    async with open_database(f"sqlite:///{folder}/policy.db") as database:
        ledger = Ledger(database, "policies")
        await ledger.migrate(MIGRATIONS)
        async with connect(url, role="policy-server", name="one", credentials=credentials) as connection:
            relay = Relay(connection, ledger, readers=[reader])
            task = asyncio.create_task(relay.run())
            yield Store(ledger, TagPool(rest=0, clock=lambda: 0), lambda _: relay.wake())
            await cancel(task)


async def test_the_example_prints_each_event_once(tmp_path: Path) -> None:
    bus = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    bus.start()
    one = Policy(AppId("front end"), AppId("back"), Ports(Protocol.TCP, 8080, 8081))
    two = Policy(AppId("é"), AppId("b"), Ports(Protocol.UDP, 53, 53))
    subscriber = Subscriber(bus.url, "audit", tmp_path)
    try:
        async with policies(bus.url, tmp_path, "audit") as store:
            await store.create([one, two], actor="test")
            wanted = [
                "org.silkbus.policy.added.v1 front end -> back tcp 8080 8081",
                "org.silkbus.policy.added.v1 é -> b udp 53 53",
            ]
            await eventually(lambda: subscriber.lines() == wanted)
            await eventually(lambda: subscriber.handled() == 2)
            subscriber.kill()
            await store.delete([one], actor="test")
            subscriber = Subscriber(bus.url, "audit", tmp_path)
            wanted.append("org.silkbus.policy.removed.v1 front end -> back tcp 8080 8081")
            await eventually(lambda: subscriber.lines() == wanted)
            bus.stop()
            shutil.rmtree(tmp_path / "jetstream")  # with it go the stream, the consumer, and what was acknowledged
            bus.start()
            await store.delete([two], actor="test")
            wanted.append("org.silkbus.policy.removed.v1 é -> b udp 53 53")
            await eventually(lambda: subscriber.lines() == wanted, timeout=60)
            await asyncio.sleep(2)
            assert subscriber.lines() == wanted
    finally:
        subscriber.kill()
        bus.stop()


async def test_relay_and_reader_need_no_more_than_nats_config_permits(tmp_path: Path) -> None:
    guarded = Guarded.make(tmp_path)
    folder = guarded.credentials(READER, "r1").cert.parent
    subscriber = Subscriber(guarded.url, "r1", tmp_path, str(folder))
    try:
        guarded.start()
        async with policies(guarded.url, tmp_path, "r1", guarded.credentials(POLICY_SERVER)) as store:
            for number in range(3):
                app = AppId(f"app-{number}")
                await store.create([Policy(app, app, Ports(Protocol.TCP, 1, 2))], actor="test")
            wanted = [f"org.silkbus.policy.added.v1 app-{n} -> app-{n} tcp 1 2" for n in range(3)]
            await eventually(lambda: subscriber.lines() == wanted)
    finally:
        subscriber.kill()
        guarded.stop()
