"""A standing cell among a thousand: from a new lease to its route there, and what the cell's worker costs when idle.

    python -m bench.silk_standing [--cells N] [--new N] [--idle SECONDS]

Needs root. A real bus, controller (SQLite) and worker, in network namespaces made for it and deleted afterwards. The
time is from the moment before the new cell asks the controller to the kernel's notice of the route in the standing
cell. Idle is the processor time of the worker's process and of the kernel for it, heartbeats and renewals included.
"""

import argparse
import asyncio
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bench.silk_converge import ip
from bus.connection import connect
from bus.local import Service
from bus.messages import CellName
from services.silk.client import LeaseClient
from services.silk.namespace import opened
from services.silk.netlink import attributes, messages
from services.silk.rtnetlink import NEWROUTE

OVERLAY = IPv4Network("10.0.0.0/8")
HUB, STANDING = IPv4Address("172.16.255.254"), IPv4Address("172.16.255.1")
FIRST = IPv4Address("172.16.0.1")
TICK = os.sysconf("SC_CLK_TCK")


def start(stack: ExitStack, namespace: str, *command: str, **settings: str) -> subprocess.Popen[bytes]:
    environment = {f"SILKBUS_{name.upper()}": value for name, value in settings.items()}
    log = stack.enter_context(open(os.environ.get("BENCH_LOG", os.devnull), "ab"))  # noqa: PTH123, SIM115
    process = subprocess.Popen(  # noqa: S603 (programs of ours)
        ["ip", "netns", "exec", namespace, *command],  # noqa: S607
        env={**os.environ, **environment},
        stdout=log,
        stderr=log,
    )

    def stop() -> None:
        process.terminate()
        process.wait(30)

    stack.callback(stop)
    return process


def routes_heard(namespace: str) -> socket.socket:
    """A socket that hears of routes in the namespace."""

    def make() -> socket.socket:
        heard = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        heard.bind((0, 1 << 6))  # RTMGRP_IPV4_ROUTE
        return heard

    with opened(f"/run/netns/{namespace}") as there:
        return there.run(make)


def wait_for_route(heard: socket.socket, subnet: IPv4Network, seconds: float = 30) -> float:
    """When the route came, by the monotonic clock."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([heard], [], [], 1)[0]:
            data = heard.recv(1 << 16)
            now = time.monotonic()
            for kind, _, _, body, _ in messages(data):
                if kind == NEWROUTE and attributes(body[12:]).get(1) == subnet.network_address.packed:
                    return now
    sys.exit(f"no route to {subnet} within {seconds:g} s")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def ready(worker: Service) -> None:
    for _ in range(600):
        try:
            await worker.call("GET", "/")
        except Exception:  # noqa: BLE001, S110 (it is starting)
            pass
        else:
            return
        await asyncio.sleep(0.1)
    sys.exit("the worker is not ready after a minute")


async def measure(arguments: argparse.Namespace, nats: str, worker: Service, pid: int, cell: str) -> None:
    async with connect(nats, role="cell", name=CellName("bench")) as connection:

        async def acquire(number: int) -> IPv4Network:
            client = LeaseClient(connection, CellName(f"cell-{number}"), FIRST + number, (OVERLAY,))
            return (await client.acquire()).lease.subnet

        await ready(worker)
        for begin in range(0, arguments.cells, 20):
            await asyncio.gather(*(acquire(number) for number in range(begin, begin + 20)))
        known = len((await worker.call("GET", "/leases"))["leases"])
        while known < arguments.cells + 1:
            await asyncio.sleep(0.2)
            known = len((await worker.call("GET", "/leases"))["leases"])
        await asyncio.sleep(3)
        times, heard = [], routes_heard(cell)
        for number in range(arguments.cells, arguments.cells + arguments.new):
            begun = time.monotonic()
            subnet = await acquire(number)
            times.append((await asyncio.to_thread(wait_for_route, heard, subnet) - begun) * 1000)
            await asyncio.sleep(0.05)
        times.sort()
        p50, p99 = statistics.median(times), times[min(len(times) - 1, int(len(times) * 0.99))]
        print(f"{known} leases, one more to its route: p50 {p50:.1f} ms   p99 {p99:.1f} ms   n {len(times)}")
        heard.close()
    await worker.close()
    await asyncio.sleep(5)
    before, begun = cpu_seconds(pid), time.monotonic()
    await asyncio.sleep(arguments.idle)
    share = (cpu_seconds(pid) - before) / (time.monotonic() - begun)
    print(f"{known + arguments.new} leases, idle for {arguments.idle:g} s: {share:.2%} of a core")


def main() -> None:
    parser = argparse.ArgumentParser(description="A standing cell among a thousand.")
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--idle", type=float, default=60)
    arguments = parser.parse_args()
    prefix = f"silkbus-bench-{os.getpid()}"
    hub, cell = f"{prefix}-hub", f"{prefix}-cell"
    nats = f"nats://{HUB}:4222"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for namespace in (hub, cell):
            ip("netns", "add", namespace)
            stack.callback(ip, "netns", "del", namespace)
        ip("-n", hub, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", cell)
        for namespace, address in ((hub, HUB), (cell, STANDING)):
            ip("-n", namespace, "addr", "add", f"{address}/16", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        start(stack, hub, str(Path(sys.executable).with_name("nats-server")), "-a", str(HUB), "-p", "4222")
        start(
            stack,
            hub,
            *(sys.executable, "-m", "services.silk.controller"),
            database=f"sqlite:///{folder / 'silk.db'}",
            overlay_network=str(OVERLAY),
            run_dir=str(folder / "centre"),
            nats=nats,
        )
        worker = start(
            stack,
            cell,
            *(sys.executable, "-m", "services.silk.worker"),
            cell="standing",
            underlay=str(STANDING),
            overlay_network=str(OVERLAY),
            state_dir=str(folder / "state"),
            run_dir=str(folder / "run"),
            nats=nats,
        )
        service = Service("silk", folder / "run" / "silk" / "silk.sock")
        with opened(f"/run/netns/{hub}") as namespace:
            namespace.run(lambda: asyncio.run(measure(arguments, nats, service, worker.pid, cell)))


if __name__ == "__main__":
    main()
