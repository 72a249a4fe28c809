"""HTTP over TLS that also answers those who speak plain HTTP to it.

Cloud Foundry's jobs look whether a server is up with `curl http://127.0.0.1:PORT` also where it speaks TLS, and take
any HTTP answer for a sign of life (contract/policy.md 2.1). So the first byte of each connection is looked at, without
taking it from the socket, before anything decides what is spoken.
"""

import asyncio
import logging
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

from bus.decode import Malformed
from bus.listener import server_tls
from bus.local import HttpServer
from bus.log import about

log = logging.getLogger(__name__)

FIRST_BYTE_SECONDS = 10.0
HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 2.0
"""For a client to confirm the end of TLS; one that is idle does not read it."""
ACCEPT_PAUSE = 0.1
"""Before the next try when the process has no files left."""
_HANDSHAKE = b"\x16"
"""The type of a TLS record that begins a connection (RFC 8446, 5.1)."""
_PLAIN = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"Client sent an HTTP request to an HTTPS server.\n"
)


def mutual_tls(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS 1.2 and later for clients with a certificate of this authority. Raises Malformed."""
    context = server_tls(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise Malformed(f"ca_cert_file: {authority} holds no readable PEM certificates ({error})") from None
    return context


class TlsServer(HttpServer):
    """A server of bus.local whose connections are TLS, but for the answer to those who speak plain HTTP."""

    _accepting: "asyncio.Task[None] | None" = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._starting: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(sockets or []))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._accepting is not None:
            for task in (self._accepting, *self._starting):
                task.cancel()
            await asyncio.gather(self._accepting, *self._starting, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listeners: list[socket.socket]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for listener in listeners:
                tasks.create_task(self._accept_from(listener))

    async def _accept_from(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # ECONNABORTED, EMFILE and the like: others may fare better
                log.warning("connection not accepted", extra=about(error=str(error)))
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            task = asyncio.create_task(self._begin(connection))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _begin(self, connection: socket.socket) -> None:
        """Hand the connection to the HTTP protocol, over TLS; or answer it, if it is not TLS, and close it."""
        try:
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if await _first_byte(connection) != _HANDSHAKE:
                with suppress(OSError):
                    connection.recv(1 << 16)  # what is unread when we close would reset the connection
                    connection.send(_PLAIN)
                connection.close()
                return
            config = self.config
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                connection,
                ssl=config.ssl,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=CLOSE_SECONDS,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            log.info("no TLS connection", extra=about(error=str(error) or "it took too long"))
            connection.close()
        except BaseException:
            connection.close()
            raise

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


async def _first_byte(connection: socket.socket) -> bytes:
    """The first byte that comes, left where it is; empty if the client ends first. Raises TimeoutError or OSError."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        async with asyncio.timeout(FIRST_BYTE_SECONDS):
            await readable.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)
