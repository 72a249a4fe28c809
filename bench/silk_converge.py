"""How long Silk's work in the kernel takes: converging on many leases, attaching and detaching containers.

    python -m bench.silk_converge [--containers N]

Needs root. Everything is done in network namespaces made for it and deleted afterwards.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from bus.messages import CellName, Handle, Lease
from services.silk.attachments import Wanted
from services.silk.namespace import opened
from services.silk.network import CellNetwork
from services.silk.peers import desired
from services.silk.pool import Kind, Pool
from services.silk.settings import WorkerSettings
from services.silk.subnets import vtep_mac

OVERLAY = IPv4Network("10.0.0.0/8")
UNDERLAY = IPv4Address("172.16.0.1")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)  # noqa: S603, S607 (fixed arguments; ip is where the system has it)


def milliseconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def line(what: str, values: list[float]) -> None:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    print(f"{what:44} p50 {statistics.median(ordered):8.2f} ms   p95 {p95:8.2f} ms   n {len(ordered)}")


def converge(network: CellNetwork, own: Lease, leases: list[Lease]) -> None:
    count = len(leases) - 1

    def apply(wanted: list[Lease], *, sweep: bool = False) -> None:
        result = network.converge(desired(own, (OVERLAY,), wanted), delete=True, sweep=sweep)
        if result.failed:
            sys.exit(f"{result.failed} entries were refused")

    cold, again, one, sweep, gone = [], [], [], [], []
    for _ in range(5):
        cold.append(milliseconds(lambda: apply(leases)))
        again.append(milliseconds(lambda: apply(leases)))
        moved = [*leases[:-1], Lease(leases[-1].subnet, leases[-1].cell, IPv4Address("172.31.0.1"), leases[-1].mac)]
        one.append(milliseconds(lambda wanted=moved: apply(wanted)))  # type: ignore[misc]
        sweep.append(milliseconds(lambda wanted=moved: apply(wanted, sweep=True)))  # type: ignore[misc]
        gone.append(milliseconds(lambda: apply([])))
    line(f"{count} leases: cold", cold)
    line(f"{count} leases: nothing to do", again)
    line(f"{count} leases: one changed", one)
    line(f"{count} leases: sweep, nothing to do", sweep)
    line(f"{count} leases: all removed", gone)


def attach(network: CellNetwork, prefix: str, count: int) -> None:
    names = [f"{prefix}-c{number}" for number in range(count)]
    try:
        for name in names:
            ip("netns", "add", name)
        times = [
            milliseconds(lambda name=name: network.attach(Wanted(Handle(name), f"/run/netns/{name}", "eth0")))  # type: ignore[misc]
            for name in names
        ]
        line(f"attach, 1 to {count} containers on the cell", times)
        line(f"attach, the last 20 of {count}", times[-20:])
        line(
            "attach again",
            [
                milliseconds(lambda: network.attach(Wanted(Handle(names[0]), f"/run/netns/{names[0]}", "eth0")))
                for _ in range(50)
            ],
        )
        line(f"detach, {count} to 1", [milliseconds(lambda n=n: network.detach(Handle(n), None)) for n in names])  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)  # noqa: S603, S607


def main() -> None:
    parser = argparse.ArgumentParser(description="How long Silk's work in the kernel takes.")
    parser.add_argument("--containers", type=int, default=100)
    arguments = parser.parse_args()
    prefix = f"silkbus-bench-{os.getpid()}"
    pool = list(Pool((OVERLAY,), 24).subnets(Kind.BLOCK))
    leases = [
        Lease(subnet, CellName(f"cell-{number}"), UNDERLAY + number, vtep_mac(subnet))
        for number, subnet in enumerate(pool[:1001])
    ]
    ip("netns", "add", prefix)
    try:
        ip("-n", prefix, "link", "add", "eth0", "type", "bridge")
        ip("-n", prefix, "addr", "add", f"{UNDERLAY}/16", "dev", "eth0")
        ip("-n", prefix, "link", "set", "eth0", "up")
        with tempfile.TemporaryDirectory() as folder, opened(f"/run/netns/{prefix}") as namespace:
            settings = WorkerSettings(
                cell="cell-0", underlay=UNDERLAY, overlay_network=(OVERLAY,), state_dir=Path(folder)
            )

            def measure() -> None:
                network = CellNetwork(settings)
                print(f"{'take the overlay up, cold':44} {milliseconds(lambda: network.take_up(leases[0])):12.2f} ms")
                print(
                    f"{'take the overlay up, standing':44} {milliseconds(lambda: network.take_up(leases[0])):12.2f} ms"
                )
                for count in (250, 1000):
                    converge(network, leases[0], leases[: count + 1])
                attach(network, prefix, arguments.containers)

            namespace.run(measure)
    finally:
        subprocess.run(["ip", "netns", "del", prefix], check=False)  # noqa: S603, S607


if __name__ == "__main__":
    main()
