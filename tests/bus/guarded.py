"""Real nats-servers that run with what `silkbus nats-config` wrote, and clients with its certificates."""

import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import nats
from nats.aio.client import Client

from bus import subjects
from bus.credentials import Credentials
from bus.decode import Malformed
from bus.nats_config import Layout, Server
from bus.tables import POLICIES, Key, Table
from tests.nats_server import NatsServer, free_port


def _decode(key: Key, value: object) -> str:
    if isinstance(value, str):
        return value
    raise Malformed(f"{key}: not text")


NOTES_AS_POLICIES: Table[str] = Table(POLICIES.name, _decode)
"""The tests' table of texts, under the name of the policy server's own."""


@dataclass
class Guarded:
    """Servers and the layout they run with."""

    layout: Layout
    servers: list[NatsServer]

    @classmethod
    def make(cls, folder: Path, *, count: int = 1, cells: Sequence[str] = ("cell-1", "cell-2")) -> "Guarded":
        servers = [NatsServer(folder / f"n{number}") for number in range(count)]
        named = tuple(
            Server(f"n{number}", "127.0.0.1", server.port, free_port()) for number, server in enumerate(servers)
        )
        layout = Layout(folder / "nats", named, tuple(cells), ("r1", "r2"))
        layout.write()
        for server, name in zip(servers, named, strict=True):
            server.folder.mkdir()
            server.arguments = ("-c", str(layout.server_folder(name) / "nats-server.conf"))
        return cls(layout, servers)

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def allow(self, *cells: str) -> None:
        """Write the configuration for these cells, and have the servers take it up."""
        self.layout = dataclasses.replace(self.layout, cells=cells)
        self.layout.write()
        for server in self.servers:
            assert server.process is not None
            os.kill(server.process.pid, signal.SIGHUP)

    def credentials(self, role: str, name: str = "") -> Credentials:
        folder = self.layout.out / "clients" / role / name
        return Credentials(folder / "ca.crt", folder / "client.crt", folder / "client.key")


@dataclass
class Thief:
    """A client that has somebody's certificate, and does with it as it likes."""

    client: Client
    errors: list[str]

    async def publishes(self, subject: str, data: bytes = b"", reply: str = "") -> bool:
        """Whether NATS lets it publish there."""
        self.errors.clear()
        await self.client.publish(subject, data, reply=reply)
        return await self._allowed("publish", subject)

    async def listens(self, subject: str, queue: str = "") -> bool:
        """Whether NATS lets it listen there."""
        self.errors.clear()
        await self.client.subscribe(subject, queue=queue)
        return await self._allowed("subscription", subject)

    async def _allowed(self, what: str, subject: str) -> bool:
        await barrier(self.client)
        refusals = [
            error for error in self.errors if f'permissions violation for {what} to "{subject.lower()}"' in error
        ]
        assert len(refusals) == len(self.errors), self.errors
        return not refusals


async def barrier(client: Client) -> None:
    """Return when the server has taken in all that was sent before.

    One flush is not enough: nats-py 2.16 sends its PING ahead of what is still in its buffer.
    """
    await client.flush()
    await client.flush()


@asynccontextmanager
async def thief(guarded: Guarded, role: str, name: str = "") -> AsyncIterator[Thief]:
    errors: list[str] = []

    async def on_error(error: Exception) -> None:
        errors.append(str(error).lower())

    client = await nats.connect(
        guarded.servers[0].url,
        tls=guarded.credentials(role, name).context(),
        inbox_prefix=subjects.inbox(role, name or "thief"),
        error_cb=on_error,
        allow_reconnect=False,
    )
    try:
        yield Thief(client, errors)
    finally:
        await client.close()
