"""From a changed policy to what packets see of it. As root: `python -m bench.policy_change [--rounds N] [--watch S]`.

On a cell that has so many policies among 250 apps, in network namespaces of its own. T2: from the moment when the
enforcer is told of a policy to the first datagram let through. T3: from the moment when it is told that the policy went
to the last byte that arrives at either end, with client and server both sending all the time, for TCP and UDP, on the
same cell and from another; then nothing more may arrive for as long as `--watch` says (60 s in a full run).

The enforcer is fed directly: what the API, the database and the bus add is not in it.
"""

import argparse
import asyncio
import os
import socket
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from bench.data_plane import PORT, fill, known
from bus.messages import Ports, Protocol
from tests.enforcer.conftest import Enforcer, enforcing
from tests.enforcer.world import Box, cells, inside

SILENCE = 1.0
"""Seconds without a byte after which a flow is taken for cut."""
GAP = 0.001


class Flow:
    """Both ends send all the time; when the last byte arrived at either is kept."""

    def __init__(self, client: Box, server: Box, kind: socket.SocketKind) -> None:
        def bind() -> socket.socket:
            made = socket.socket(socket.AF_INET, kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((str(server.address), PORT))
            return made

        far = inside(server.name, bind)
        if kind is socket.SOCK_STREAM:
            far.listen()
            self.near = client.tcp(server, PORT)
            self.far, _ = far.accept()
            far.close()
        else:
            self.near = client.udp(server, PORT)
            self.near.send(b"x")
            _, peer = far.recvfrom(16)
            far.connect(peer)
            self.far = far
        self.last = 0.0
        self._end = False
        for one in (self.near, self.far):
            one.settimeout(0.1)
            threading.Thread(target=self._send, args=(one,), daemon=True).start()
            threading.Thread(target=self._take, args=(one,), daemon=True).start()

    def _send(self, one: socket.socket) -> None:
        while not self._end:
            with suppress(OSError):
                one.send(b"x" * 64)
            time.sleep(GAP)

    def _take(self, one: socket.socket) -> None:
        while not self._end:
            try:
                if one.recv(4096):
                    self.last = time.monotonic()
                    continue
            except OSError:
                pass
            time.sleep(GAP)

    def close(self) -> None:
        self._end = True
        self.near.close()
        self.far.close()


def report(what: str, taken: list[float]) -> None:
    taken.sort()
    p99 = taken[min(len(taken) - 1, round(len(taken) * 0.99))]
    print(f"{what:44} p50 {statistics.median(taken):7.1f} ms   p99 {p99:7.1f} ms   n {len(taken)}", flush=True)


async def first_packet(enforcer: Enforcer, client: Box, server: Box, both: tuple[Ports, ...], rounds: int) -> None:
    server.serve(PORT)
    asking = client.udp(server, PORT)
    asking.setblocking(False)
    taken = []
    for _ in range(rounds):
        await enforcer.allow("web", "api")
        await asyncio.sleep(0.15)
        began = time.monotonic()
        change = asyncio.create_task(enforcer.allow("web", "api", *both))
        while True:
            with suppress(BlockingIOError, ConnectionRefusedError):
                asking.send(b"x")
            await asyncio.sleep(GAP)
            with suppress(BlockingIOError, ConnectionRefusedError):
                asking.recv(16)
                break
        taken.append((time.monotonic() - began) * 1000)
        await change
    report("T2 policy to first packet, same cell", taken)
    server.servers.pop().close()


async def revoked(enforcer: Enforcer, client: Box, server: Box, what: str, rounds: int, watch: float) -> None:
    both = (Ports(Protocol.TCP, PORT, PORT), Ports(Protocol.UDP, PORT, PORT))
    for kind, name in ((socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")):
        taken = []
        for number in range(rounds):
            await enforcer.allow("web", "api", *both)
            flow = await asyncio.to_thread(Flow, client, server, kind)
            await asyncio.sleep(0.2)
            began = time.monotonic()
            await enforcer.allow("web", "api")
            await asyncio.sleep(watch if number == 0 else SILENCE)
            if flow.last > time.monotonic() - SILENCE / 2:
                raise SystemExit(f"{name}, {what}: not cut")
            taken.append(max(0.0, flow.last - began) * 1000)
            flow.close()
        report(f"T3 policy removed to last byte, {name}, {what}", taken)


async def measure(kind: str, arguments: argparse.Namespace) -> None:
    both = (Ports(Protocol.TCP, PORT, PORT), Ports(Protocol.UDP, PORT, PORT))
    with cells(2) as (other, cell):
        far, near, api = other.box("web"), cell.box("web"), cell.box("api")
        async with (
            enforcing(other, kind, known=known(0)),
            enforcing(cell, kind, known=known(arguments.policies)) as enforcer,
        ):
            await fill(enforcer)
            print(f"{kind}: {arguments.policies} policies on the cell")
            await first_packet(enforcer, near, api, both, arguments.rounds)
            await revoked(enforcer, near, api, "same cell", arguments.rounds // 2, arguments.watch)
            await revoked(enforcer, far, api, "from another cell", arguments.rounds // 2, arguments.watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("nft", "legacy"), action="append")
    parser.add_argument("--policies", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--watch", type=float, default=3.0, help="seconds of silence to see once for each kind of flow")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XTABLES_LOCKFILE"] = str(Path(folder) / "lock")
        for kind in arguments.kind or ("nft", "legacy"):
            asyncio.run(measure(kind, arguments))


if __name__ == "__main__":
    main()
