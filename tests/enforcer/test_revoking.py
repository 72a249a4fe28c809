"""A policy is taken away while flows run: not a byte more either way, whoever sends, and whoever only waits is told."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

import pytest

from bus.messages import Ports
from tests.enforcer.conftest import enforcing, tags, tcp, udp
from tests.enforcer.world import WAIT, Box, cells, dial, echoes, inside

pytestmark = pytest.mark.kernel
KNOWN = tags(web=1, api=0x1234, db=3)
BOUND = 1.0
"""Seconds after which nothing may arrive any more; the machine may be busy."""
WATCHED = 4.0
"""Seconds for which nothing arrives after that."""


class Flow:
    """One flow between two containers, in which one side or both push without pause; what arrives is counted."""

    def __init__(self, client: Box, server: Box, port: int, protocol: str, pushing: str) -> None:
        self.name = f"{protocol} {port}, {pushing} pushing"
        self._arrived = {"client": 0, "server": 0}
        self._end = False
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM

        def bind() -> socket.socket:
            made = socket.socket(socket.AF_INET, kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((str(server.address), port))
            return made

        far = inside(server.name, bind)
        if kind is socket.SOCK_STREAM:
            far.listen()
            far.settimeout(WAIT)
            self.near = client.tcp(server, port)
            self.far, _ = far.accept()
            far.close()
        else:
            self.near = client.udp(server, port)
            self.near.send(b"hello")
            far.settimeout(WAIT)
            _, peer = far.recvfrom(16)
            far.connect(peer)
            self.far = far
        for one in (self.near, self.far):
            one.settimeout(0.2)
        for side, one in (("client", self.near), ("server", self.far)):
            threading.Thread(target=self._take, args=(one, side), daemon=True).start()
            if pushing in (side, "both"):
                threading.Thread(target=self._push, args=(one,), daemon=True).start()

    @property
    def arrived(self) -> int:
        """Bytes, at both ends together."""
        return sum(self._arrived.values())

    def _push(self, one: socket.socket) -> None:
        while not self._end:
            with suppress(OSError):
                one.send(b"x" * 100)
            time.sleep(0.005)

    def _take(self, one: socket.socket, side: str) -> None:
        while not self._end:
            try:
                self._arrived[side] += len(one.recv(4096))
            except OSError:
                time.sleep(0.005)

    def close(self) -> None:
        self._end = True
        self.near.close()
        self.far.close()


@contextmanager
def flows(client: Box, server: Box, first_port: int) -> Iterator[list[Flow]]:
    made: list[Flow] = []
    try:
        for protocol in ("tcp", "udp"):
            made += [
                Flow(client, server, first_port + n, protocol, pushing)
                for n, pushing in enumerate(("server", "client", "both"))
            ]
        yield made
    finally:
        for flow in made:
            flow.close()


async def runs(flow: Flow) -> bool:
    """Whether something arrives within the time in which it must."""
    before, deadline = flow.arrived, time.monotonic() + WAIT
    while flow.arrived == before and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return flow.arrived > before


@pytest.mark.parametrize("count", [1, 2])
async def test_not_a_byte_more_either_way(kind: str, count: int) -> None:
    with cells(count) as made:
        web, db, api = made[0].box("web"), made[0].box("db"), made[-1].box("api")
        spans: tuple[Ports, ...] = (tcp(8000, 8002), udp(8000, 8002))
        async with AsyncExitStack() as stack:
            enforcers = [await stack.enter_async_context(enforcing(cell, kind, known=KNOWN)) for cell in made]
            last = enforcers[-1]
            await last.allow("web", "api", *spans, tcp(9000, 9002), udp(9000, 9002))
            await last.allow("db", "api", *spans)
            with flows(web, api, 8000) as cut, flows(web, api, 9000) as kept, flows(db, api, 8000) as others:
                for flow in (*cut, *kept, *others):
                    assert await runs(flow), flow.name
                # One revision: what was one span of ports is another that has nothing of the first.
                await last.allow("web", "api", tcp(9000, 9002), udp(9000, 9002))
                await asyncio.sleep(BOUND)
                before = {flow.name: flow.arrived for flow in cut}
                await asyncio.sleep(WATCHED)
                assert {flow.name: flow.arrived for flow in cut} == before
                for flow in (*kept, *others):
                    assert await runs(flow), flow.name
                # Allowed again, datagrams flow again where they did; connections that were ended stay so.
                await last.allow("web", "api", *spans)
                for flow in cut[3:]:
                    assert await runs(flow), flow.name
                assert {flow.name: flow.arrived for flow in cut[:3]} == dict(list(before.items())[:3])


def ended(one: socket.socket) -> bool:
    """Whether a connection nobody uses is over, as its holder sees it who only waits."""
    one.settimeout(WAIT)
    try:
        return one.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("count", [1, 2])
async def test_both_ends_of_an_idle_connection_are_told(kind: str, count: int) -> None:
    with cells(count) as made:
        web, api = made[0].box("web"), made[-1].box("api")

        def listen() -> socket.socket:
            # As Go and Java do: one socket for both versions of IP.
            return socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)

        listener = inside(api.name, listen)
        listener.settimeout(WAIT)
        host = api.serve(9999)
        async with AsyncExitStack() as stack:
            enforcers = [await stack.enter_async_context(enforcing(cell, kind, known=KNOWN)) for cell in made]
            await enforcers[-1].allow("web", "api", tcp(8080), tcp(9999))
            near = web.tcp(api, 8080)
            far, _ = listener.accept()
            kept, own = web.tcp(api, 9999), dial(made[-1], api.address, 9999)
            assert echoes(kept)
            assert echoes(own)
            await enforcers[-1].allow("web", "api", tcp(9999))
            assert await asyncio.to_thread(ended, near)
            assert await asyncio.to_thread(ended, far)
            assert echoes(kept)
            assert echoes(own), "no policy let it in, and none takes it back"
            # The server still listens.
            await enforcers[-1].allow("web", "api", tcp(8080))
            web.tcp(api, 8080).close()
            listener.accept()[0].close()
            assert host.stream.fileno() >= 0
        listener.close()
