"""A policy is taken away while flows run: not a byte more either way, whoever sends, and whoever only waits is told."""

import asyncio
import socket
from contextlib import AsyncExitStack

import pytest

from bus.messages import Ports
from tests.enforcer.conftest import enforcing, tags, tcp, udp
from tests.enforcer.pushing import flows, runs
from tests.enforcer.world import WAIT, cells, dial, echoes, inside

pytestmark = pytest.mark.kernel
KNOWN = tags(web=1, api=0x1234, db=3)
BOUND = 1.0
"""Seconds after which nothing may arrive any more; the machine may be busy."""
WATCHED = 3.0
"""Seconds for which nothing arrives after that."""


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
