"""What is served on a connection can be found and looked at as NATS micro services can (ADR-32)."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client

from bus.connection import Connection, connect
from bus.decode import Fields
from bus.wire import decode, encode
from tests.bus.tables import centre, eventually
from tests.nats_server import NatsServer


async def ask_all(client: Client, subject: str, wanted: int) -> list[dict[str, Any]]:
    """The first `wanted` answers to a question that every service gets."""
    inbox = await client.subscribe(client.new_inbox())
    await client.publish(subject, reply=inbox.subject)
    return [json.loads((await inbox.next_msg(timeout=10)).data) for _ in range(wanted)]


async def double(_: str, request: Fields) -> Mapping[str, Any]:
    number = request.integer("number")
    if number == 13:
        raise ZeroDivisionError("thirteen")
    return {"double": 2 * number}


async def served(url: str, connection: Connection, subject: str) -> None:
    """Wait until somebody answers there."""
    assert await connection.wait_connected(10)
    client = await nats.connect(url)
    try:
        for _ in range(200):
            try:
                await client.request(subject, b"", timeout=1)
                return
            except nats.errors.Error:
                await asyncio.sleep(0.05)
    finally:
        await client.close()


async def test_a_service_can_be_found_and_says_how_it_fares(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, role="doubler", name="one") as connection:
        await connection.serve("silkbus.double.*.now", double, queue="doublers")
        await served(nats_server.url, connection, "$SRV.PING")
        client = await nats.connect(nats_server.url)

        (ping,) = await ask_all(client, "$SRV.PING", 1)
        assert ping["type"] == "io.nats.micro.v1.ping_response"
        assert (ping["name"], ping["metadata"]) == ("doubler", {"instance": "one"})
        for subject in ("$SRV.INFO", "$SRV.INFO.doubler", f"$SRV.INFO.doubler.{ping['id']}"):
            (info,) = await ask_all(client, subject, 1)
            assert (info["type"], info["id"]) == ("io.nats.micro.v1.info_response", ping["id"])
            (endpoint,) = info["endpoints"]
            assert (endpoint["name"], endpoint["subject"]) == ("double-now", "silkbus.double.*.now")
            assert endpoint["queue_group"] == "doublers"

        good = await client.request("silkbus.double.x.now", encode({"number": 4}), timeout=10)
        assert (decode(good.data, "answer").integer("double"), good.headers) == (8, None)
        for number, code in ((13, "500"), ("x\n", "400")):
            bad = await client.request("silkbus.double.x.now", encode({"number": number}), timeout=10)
            assert bad.headers is not None
            assert bad.headers["Nats-Service-Error-Code"] == code
            assert decode(bad.data, "answer").text("error").startswith(bad.headers["Nats-Service-Error"][:20])
        (stats,) = await ask_all(client, "$SRV.STATS.doubler", 1)
        (endpoint,) = stats["endpoints"]
        assert (endpoint["num_requests"], endpoint["num_errors"]) == (3, 2)
        assert endpoint["processing_time"] >= 3 * endpoint["average_processing_time"] > 0
        assert stats["started"].endswith("Z")
        await client.close()


async def test_an_answer_goes_to_inboxes_only(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, role="doubler", name="one") as connection:
        await connection.serve("silkbus.double", double, queue="doublers")
        await served(nats_server.url, connection, "$SRV.PING")
        client = await nats.connect(nats_server.url)
        elsewhere = await client.subscribe("silkbus.table.policies.change")
        for subject in ("silkbus.double", "$SRV.PING", "$SRV.STATS"):
            await client.publish(subject, encode({"number": 1}), reply=elsewhere.subject)
        await client.request("silkbus.double", encode({"number": 1}), timeout=10)
        assert len(await ask_all(client, "$SRV.PING", 1)) == 1
        assert elsewhere.pending_msgs == 0
        await client.close()


async def test_every_instance_answers_and_outlives_its_connections(tmp_path: Path) -> None:
    """The table servers are such services, with nothing said of it in them."""
    server = NatsServer(tmp_path)
    server.start()
    url = f"sqlite:///{tmp_path}/notes.db"
    try:
        async with centre(server.url, url) as one, centre(server.url, url) as two:
            connections = [one.publisher.connection, two.publisher.connection]
            ids = set()
            for _ in range(2):
                await eventually(lambda: all(connection.connected for connection in connections))
                client = await nats.connect(server.url)
                await client.flush()
                answers: list[dict[str, Any]] = []
                for _ in range(100):
                    try:
                        answers = await ask_all(client, "$SRV.INFO.server", 2)
                        break
                    except nats.errors.Error:
                        await asyncio.sleep(0.1)
                ids.add(tuple(sorted(answer["id"] for answer in answers)))
                assert {endpoint["name"] for answer in answers for endpoint in answer["endpoints"]} == {
                    "table-notes-fetch"
                }
                await client.close()
                server.stop()
                await eventually(lambda: not any(connection.connected for connection in connections))
                server.start()
            assert len(ids) == 1
    finally:
        server.stop()
