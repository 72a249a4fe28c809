"""Flows between containers in which something is sent all the time, and what arrives is counted."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.enforcer.world import WAIT, Box, inside


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
