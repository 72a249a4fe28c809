"""The event stream on a cluster of three NATS servers, with the permissions that nats-config writes."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import Client

from bus.connection import connect
from bus.database import open_database
from bus.events import Relay
from bus.events.event import events_of
from bus.ledger import Ledger
from bus.messages import AppId, Policy, Ports, Protocol, Revision
from bus.permissions import POLICY_SERVER
from services.policy.schema import MIGRATIONS
from services.policy.store import Store
from services.policy.tag_pool import TagPool
from tests.bus.guarded import Guarded
from tests.bus.tables import cancel

STREAM = "SILKBUS_POLICIES"


async def stream_ids(guarded: Guarded) -> list[str] | None:
    """The ids in the stream, in order; None while the cluster cannot say."""
    client = Client()
    try:
        await client.connect(
            guarded.url.split(","),
            tls=guarded.credentials(POLICY_SERVER).context(),
            inbox_prefix=f"_INBOX.{POLICY_SERVER}.test",
            connect_timeout=5,
            error_cb=_ignore,
        )
        js = client.jetstream(timeout=5)
        state = (await js.stream_info(STREAM)).state
        found = [await js.get_msg(STREAM, at) for at in range(max(1, state.first_seq), state.last_seq + 1)]
    except (nats.errors.Error, OSError, TimeoutError):
        return None
    finally:
        await client.close()
    return [message.headers["ce-id"] for message in found]


async def _ignore(_: Exception) -> None:
    """A server that is down is what the test is about."""


async def until_relayed(guarded: Guarded, ledger: Ledger) -> None:
    epoch, _ = await ledger.head()
    entries = await ledger.log_from(Revision(0), limit=10_000)
    wanted = [str(event.id) for entry in entries for event in events_of("policies", epoch, entry)]
    async with asyncio.timeout(120):
        while (found := await stream_ids(guarded)) != wanted:
            assert found is None or found == wanted[: len(found)]
            await asyncio.sleep(0.5)


async def test_any_server_of_three_may_die_and_no_event_is_lost_or_doubled(tmp_path: Path) -> None:
    guarded = Guarded.make(tmp_path, count=3)
    guarded.start()
    try:
        async with open_database(f"sqlite:///{tmp_path}/policy.db") as database, AsyncExitStack() as stack:
            ledger = Ledger(database, "policies")
            await ledger.migrate(MIGRATIONS)
            relays: list[Relay] = []
            for number in range(2):
                connection = await stack.enter_async_context(
                    connect(
                        guarded.url,
                        role=POLICY_SERVER,
                        name=f"n{number}",
                        credentials=guarded.credentials(POLICY_SERVER),
                    )
                )
                relays.append(Relay(connection, ledger, readers=["r1"], replicas=3))
                stack.push_async_callback(cancel, asyncio.create_task(relays[-1].run()))

            def committed(_: Any) -> None:
                for relay in relays:
                    relay.wake()

            store = Store(ledger, TagPool(rest=0, clock=lambda: 0), committed)

            async def write(start: int) -> None:
                for number in range(start, start + 60):
                    app = AppId(f"app-{number}")
                    ports = [Ports(Protocol.TCP, port, port) for port in (1, 2, 3)]
                    await store.create([Policy(app, app, some) for some in ports], actor="test")
                    await asyncio.sleep(0.01)

            await write(0)
            await until_relayed(guarded, ledger)
            for number, server in enumerate(guarded.servers, 1):
                writing = asyncio.create_task(write(1000 * number))
                await asyncio.sleep(0.3)
                server.stop()
                await writing
                await until_relayed(guarded, ledger)
                server.start()
    finally:
        guarded.stop()
