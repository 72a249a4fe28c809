"""A TCP proxy on loopback that can cut all its connections, at once or instead of passing on a certain message."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

Seen = Callable[[bool, bytes], bool]
"""Called with (from the server, data); True cuts the connection without passing these bytes on."""


class Proxy:
    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.cut_at: Seen | None = None
        self.cuts = 0
        self.port = 0

    def cut(self) -> None:
        """End all connections with a reset."""
        self.cuts += 1
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
            pair = {writer, there_writer}
            self._writers |= pair
            try:
                copies = [self._copy(reader, there_writer, False), self._copy(there_reader, writer, True)]
                _, rest = await asyncio.wait(map(asyncio.ensure_future, copies), return_when="FIRST_COMPLETED")
                for task in rest:
                    task.cancel()
            finally:
                self._writers -= pair
                for one in pair:
                    one.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_server: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.cut_at is not None and self.cut_at(from_server, data):
                    self.cut_at = None
                    self.cut()
                    return
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut_at = None
        proxy.cut()
