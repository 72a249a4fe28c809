"""The connection as a server sees it that is not well."""

import asyncio
import time
from pathlib import Path

import pytest

from bus.connection import Connection, connect
from bus.credentials import Credentials
from bus.decode import Malformed
from bus.settings import ServiceSettings, SettingsError, load
from tests.nats_server import NatsServer


async def test_one_that_is_let_in_and_thrown_out_does_not_come_back_in_a_hot_loop() -> None:
    came: list[float] = []

    async def throw_out(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(time.monotonic())
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576}\r\n')
        pings = 0
        while pings < 2 and (line := await reader.readline()):
            if line.startswith(b"PING"):
                pings += 1
                writer.write(b"PONG\r\n")
        await asyncio.sleep(0.01)
        writer.write(b"-ERR 'Maximum Connections Exceeded'\r\n")
        writer.close()

    server = await asyncio.start_server(throw_out, "127.0.0.1")
    url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    lost = 0
    async with server, connect(url, role="cell", name="one") as connection:

        def count() -> None:
            nonlocal lost
            lost += 1

        connection.on_connect(count)
        await asyncio.sleep(5)
    assert lost >= 3
    assert 3 <= len(came) < 40


def test_all_servers_are_tried_before_any_is_tried_again() -> None:
    servers = [f"nats://10.0.0.{number}" for number in range(5)]
    connection = Connection(servers, "cell/one", "_INBOX.cell.one", None, {})
    orders = [tuple(connection._next_server() for _ in servers) for _ in range(50)]
    assert all(set(order) == set(servers) for order in orders)
    assert len(set(orders)) > 1


def test_credentials_are_settings_and_all_or_none() -> None:
    given = {"SILKBUS_NATS_CA": "/x/ca.crt", "SILKBUS_NATS_CERT": "/x/client.crt", "SILKBUS_NATS_KEY": "/x/client.key"}
    credentials = load(ServiceSettings, None, given).nats_credentials
    assert isinstance(credentials, Credentials)
    assert str(credentials.key) == "/x/client.key"
    assert load(ServiceSettings, None, {}).nats_credentials is None
    for missing in given:
        with pytest.raises((SettingsError, Malformed), match="set all three"):
            load(ServiceSettings, None, {name: value for name, value in given.items() if name != missing})


async def test_waiting_for_a_connection_that_is_ending_lets_the_others_run(nats_server: NatsServer) -> None:
    """It once went round and round without ever giving way, so that even its own time-out never came."""
    async with connect(nats_server.url, role="server", name="one") as connection:
        assert await connection.wait_connected(10)
        client = connection._client
        assert client is not None
        ending = asyncio.create_task(client.close())
        while connection.connected:
            await asyncio.sleep(0)
        waits = 0
        while not await connection.wait_connected(0.2):
            waits += 1
            assert waits < 100
        assert connection._client is not client
        await ending


async def test_it_ends_when_told_to_while_the_server_refuses_it(tmp_path: Path) -> None:
    """nats-py forgets a cancellation now and then; one forgotten was a connection tried for ever after its end."""
    server = NatsServer(tmp_path, "--user", "somebody", "--pass", "else")
    server.start()
    try:
        async with asyncio.timeout(120):
            for number in range(400):
                async with connect(server.url, role="server", name="one"):
                    await asyncio.sleep(number % 40 / 2000)
    finally:
        server.stop()
