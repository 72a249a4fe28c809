"""The example subscriber of docs/, as its own process: it prints each event once, whatever the bus does."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bus.connection import connect
from bus.database import open_database
from bus.events import Relay
from bus.ledger import Ledger
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy.schema import MIGRATIONS
from services.policy.store import Store
from services.policy.tag_pool import TagPool
from tests.bus.tables import cancel, eventually
from tests.nats_server import NatsServer

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "subscribe.py"


class Subscriber:
    def __init__(self, bus: NatsServer, folder: Path) -> None:
        self.output = folder / "output"
        command = [sys.executable, "-u", str(EXAMPLE), bus.url, "audit", str(folder / "done.db")]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output)

    def lines(self) -> list[str]:
        """What it printed, without the times."""
        assert self.process.poll() is None, "the example has ended"
        return [line.partition(" ")[2] for line in self.output.read_text().splitlines()]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@asynccontextmanager
async def policies(bus: NatsServer, folder: Path) -> AsyncIterator[Store]:
    async with open_database(f"sqlite:///{folder}/policy.db") as database:
        ledger = Ledger(database, "policies")
        await ledger.migrate(MIGRATIONS)
        async with connect(bus.url, role="policy-server", name="one") as connection:
            relay = Relay(connection, ledger, readers=["audit"])
            task = asyncio.create_task(relay.run())
            yield Store(ledger, TagPool(rest=0, clock=lambda: 0), lambda _: relay.wake())
            await cancel(task)


async def test_the_example_prints_each_event_once(tmp_path: Path) -> None:
    bus = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    bus.start()
    one = Policy(AppId("front end"), AppId("back"), Ports(Protocol.TCP, 8080, 8081))
    two = Policy(AppId("é"), AppId("b"), Ports(Protocol.UDP, 53, 53))
    subscriber = Subscriber(bus, tmp_path)
    try:
        async with policies(bus, tmp_path) as store:
            await store.create([one, two], actor="test")
            wanted = [
                "org.silkbus.policy.added.v1 front end -> back tcp 8080 8081",
                "org.silkbus.policy.added.v1 é -> b udp 53 53",
            ]
            await eventually(lambda: subscriber.lines() == wanted)
            subscriber.kill()
            await store.delete([one], actor="test")
            subscriber = Subscriber(bus, tmp_path)
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
