"""What enforcing costs the packets. As root: `python -m bench.data_plane [--full] [--rounds N]`.

From a container of one cell to a container of another, over VXLAN, in network namespaces of its own: TCP throughput,
requests and answers a second on one connection, new connections a second; beside the same path with connection tracking
alone (one rule that accepts what is established). All variants stand at once and are measured in turn, round by round;
printed are the median of what was measured, the median of the rounds' ratios to connection tracking alone, and that of
the processor time each took for as much, which other load on the machine sways less.

Each variant: the kind of tables, and so many policies in the tables of both cells, among 250 apps. Client and server
are Python processes: throughput is by sendfile, and read without copying, so they cost little; the interpreter's share
of a request and answer is some microseconds of about fifty, of a new connection less.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import resource
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from pyroute2 import netns

from bus.messages import AppId, Container, Handle, Ports, Protocol, Stage, policy_key, tag_key
from tests.enforcer.conftest import Enforcer, enforcing
from tests.enforcer.world import Box, Cell, cells

APPS = 250
PORT = 8080
_fork = multiprocessing.get_context("fork")


class Variant(NamedTuple):
    """`kind` None: connection tracking alone."""

    kind: str | None
    policies: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.policies} policies" if self.kind else "connection tracking alone"


def known(policies: int) -> dict[tuple[str, ...], object]:
    """Tags, so many policies among apps that are not measured, as many a measured app as for those, and its own."""
    chance = random.Random(1)  # noqa: S311 (the same policies each time)
    apps = [AppId("api"), *(AppId(f"app-{n}") for n in range(1, APPS))]
    sources = [AppId(f"source-{n}") for n in range(max(1, policies // 40))]
    pairs: set[tuple[AppId, AppId]] = {(AppId("api"), AppId("web"))}
    while len(pairs) <= policies:
        pairs.add((chance.choice(apps), chance.choice(sources)))
    entries: dict[tuple[str, ...], object] = {tag_key(app): n for n, app in enumerate((*apps, *sources), 2)}
    entries[tag_key(AppId("web"))] = 1
    return entries | {policy_key(*pair): (Ports(Protocol.TCP, PORT, PORT),) for pair in pairs}


async def fill(enforcer: Enforcer) -> None:
    """Let the enforcer's cell have a container of each of the apps that are not measured."""
    first = int(enforcer.cell.subnet[3])
    enforcer.reconciler.restore(
        [
            Container(Handle(f"h{n}"), "", Stage.READY, AppId(f"app-{n}"), IPv4Address(first + n), f"s-{n}")
            for n in range(1, APPS)
        ]
    )
    await enforcer.settled()


async def enforce(pair: list[Cell], kind: str, policies: int) -> None:
    """Have the tables written; then nobody is needed for them."""
    for cell in pair:
        async with enforcing(cell, kind, known=known(policies)) as enforcer:
            await fill(enforcer)


def serve(box: Box, what: str, ready: Connection) -> None:
    """In a process of its own, in the container, until killed."""
    netns.setns(box.name)
    listener = socket.create_server((str(box.address), PORT), backlog=1024)
    ready.send(True)
    nowhere = bytearray(1 << 20)
    while True:
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with peer, suppress(ConnectionResetError):
            if what == "throughput":
                # Taken without being copied (tcp(7), MSG_TRUNC).
                while peer.recv_into(nowhere, len(nowhere), socket.MSG_TRUNC):
                    pass
            elif what == "requests":
                while peer.recv(1):
                    peer.send(b"x")


def throughput(address: str, ends: float) -> float:
    """Gbit/s."""
    with socket.create_connection((address, PORT), 5) as sender, tempfile.TemporaryFile() as file:
        sender.settimeout(None)
        size = 1 << 24
        file.truncate(size)
        began, sent = time.monotonic(), 0
        while time.monotonic() < ends:
            sent += os.sendfile(sender.fileno(), file.fileno(), sent % size, 1 << 20)
        return sent * 8 / 1e9 / (time.monotonic() - began)


def requests(address: str, ends: float) -> float:
    """A second, one at a time."""
    with socket.create_connection((address, PORT), 5) as asking:
        asking.settimeout(None)
        asking.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began, count = time.monotonic(), 0
        while time.monotonic() < ends:
            for _ in range(20):
                asking.send(b"x")
                asking.recv(1)
            count += 20
        return count / (time.monotonic() - began)


def connections(address: str, ends: float) -> float:
    """A second, one after the other; each ended by a reset, so that no ports run out."""
    began, count = time.monotonic(), 0
    while time.monotonic() < ends:
        for _ in range(10):
            made = socket.create_connection((address, PORT), 5)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            made.close()
        count += 10
    return count / (time.monotonic() - began)


MEASURES: dict[str, tuple[str, Callable[[str, float], float]]] = {
    "throughput": ("T5 Gbit/s", throughput),
    "requests": ("T6 requests/s", requests),
    "connections": ("T7 connections/s", connections),
}


def measure(client: Box, server: Box, what: str, seconds: float) -> float:
    ready, told = _fork.Pipe()
    serving = _fork.Process(target=serve, args=(server, what, told), daemon=True)
    serving.start()
    try:
        if not ready.poll(20):
            raise TimeoutError(f"no server in {server.name}")
        ready.recv()
        answer, gives = _fork.Pipe()

        def ask() -> None:
            netns.setns(client.name)
            gives.send(MEASURES[what][1](str(server.address), time.monotonic() + seconds))

        asking = _fork.Process(target=ask, daemon=True)
        asking.start()
        if not answer.poll(seconds + 30):
            raise TimeoutError(f"no answer from {client.name}")
        value = float(answer.recv())
        asking.join(10)
        return value
    finally:
        serving.kill()
        serving.join(10)


def processor_time() -> float:
    """Seconds that the processes of all measurements so far took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def to_bare(found: list[float], bare: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(found, bare, strict=True))


def tracked(pair: list[Cell]) -> None:
    for cell in pair:
        cell.exec("iptables-nft -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="0 and 50 000 policies, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    arguments = parser.parse_args()
    policies = (0, 10_000, 50_000) if arguments.full else (10_000,)
    variants = [Variant(None, 0), *(Variant(kind, count) for kind in ("nft", "legacy") for count in policies)]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["XTABLES_LOCKFILE"] = str(Path(folder) / "lock")
        ends: dict[Variant, tuple[Box, Box]] = {}
        for variant in variants:
            pair = stack.enter_context(cells(2))
            ends[variant] = pair[0].box("web"), pair[1].box("api")
            if variant.kind is None:
                tracked(pair)
            else:
                asyncio.run(enforce(pair, variant.kind, variant.policies))
        for what, (title, _) in MEASURES.items():
            values: dict[Variant, list[float]] = {variant: [] for variant in variants}
            costs: dict[Variant, list[float]] = {variant: [] for variant in variants}
            for _ in range(arguments.rounds):
                for variant in variants:
                    before = processor_time()
                    value = measure(*ends[variant], what, arguments.seconds)
                    values[variant].append(value)
                    costs[variant].append((processor_time() - before) / value)
            for variant, found in values.items():
                gained, spent = (to_bare(all_[variant], all_[variants[0]]) for all_ in (values, costs))
                median = statistics.median(found)
                print(f"{title:18} {variant!s:28} {median:10.1f}   ratio {gained:.2f}   CPU {spent:.2f}", flush=True)


if __name__ == "__main__":
    main()
