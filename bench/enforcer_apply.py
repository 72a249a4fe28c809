"""How long one change takes the enforcer. As root: `python bench/enforcer_apply.py [--kind nft|legacy] [--policies N]`.

In a network namespace of its own, removed at the end. Prints milliseconds from the update to the kernel holding it: of
a change of one policy, of one that changes nothing, of a container admitted and forgotten, and of a start.
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address
from pathlib import Path

from pyroute2 import netns

from bus.messages import AppId, Container, Handle, Ports, Protocol, Revision, Stage, policy_key, tag_key
from bus.process import KernelThread
from bus.tables import Update
from services.enforcer.reconciler import Reconciler
from services.enforcer.settings import EnforcerSettings


async def timed(rounds: int, what: str, change: Callable[[int], Awaitable[object]]) -> None:
    taken = []
    for n in range(rounds):
        began = time.perf_counter()
        await change(n)
        taken.append((time.perf_counter() - began) * 1000)
    taken.sort()
    p99 = taken[min(len(taken) - 1, round(len(taken) * 0.99))]
    print(f"{what:28} p50 {statistics.median(taken):7.1f} ms   p99 {p99:7.1f} ms   n {rounds}", flush=True)


async def measure(namespace: str, arguments: argparse.Namespace) -> None:
    kernel = KernelThread("kernel")
    await kernel.run(netns.setns, namespace)
    reconciler = Reconciler(EnforcerSettings(cell="bench", iptables=arguments.kind), kernel)
    apps = [AppId(f"app-{n}") for n in range(arguments.containers)]
    first = int(IPv4Address("10.255.1.2"))
    containers = [
        Container(Handle(f"handle-{n}"), "", Stage.READY, app, IPv4Address(first + n), f"s-{n}")
        for n, app in enumerate(apps)
    ]
    chance = random.Random(1)  # noqa: S311 (the same policies each time)
    pairs: set[tuple[AppId, AppId]] = set()
    while len(pairs) < arguments.policies:
        pairs.add((chance.choice(apps), chance.choice(apps)))
    changes: dict[tuple[str, ...], object] = {tag_key(app): n + 1 for n, app in enumerate(apps)}
    changes |= {policy_key(*pair): (Ports(Protocol.TCP, 8080, 8080),) for pair in pairs}
    revision = 1

    async def tell(changes: dict[tuple[str, ...], object]) -> None:
        nonlocal revision
        revision += 1
        reconciler.update_policies(Update(Revision(revision), changes))  # type: ignore[arg-type]
        await reconciler._applied()

    async def start(_: int) -> None:
        await reconciler.open()
        reconciler.update_policies(Update(Revision(1), changes))  # type: ignore[arg-type]
        reconciler.restore(containers[1:])
        reconciler.begin()
        task.append(asyncio.create_task(reconciler.run()))
        await reconciler._applied()

    task: list[asyncio.Task[None]] = []
    print(
        f"{arguments.kind}: {arguments.policies} policies, {arguments.containers} containers, {arguments.flows} flows"
    )
    await timed(1, "start, empty kernel", start)
    http = (Ports(Protocol.TCP, 9090, 9090),)
    new = [(apps[1 + n % (len(apps) - 1)], AppId(f"source-{n}")) for n in range(arguments.rounds)]
    await tell({tag_key(source): 40_000 + n for n, (_, source) in enumerate(new)})
    _open_flows(namespace, arguments.flows)
    await timed(arguments.rounds, "one policy added", lambda n: tell({policy_key(*new[n]): http}))
    await timed(arguments.rounds, "one policy removed", lambda n: tell({policy_key(*new[n]): None}))
    await timed(arguments.rounds, "nothing changed", lambda n: tell({policy_key(AppId("x"), AppId(str(n))): None}))
    await timed(arguments.rounds, "one container admitted again", lambda _: reconciler.admit(containers[5]))
    await timed(10, "a container comes", lambda n: reconciler.admit(_moved(containers[0], n)))
    await timed(5, "full pass", lambda _: reconciler.sync())
    task[0].cancel()
    kernel.close()


def _open_flows(namespace: str, count: int) -> None:
    """So many entries in the connection table, so that looking for those to cut has something to look through."""
    lines = "".join(
        f"-I -s 10.255.{2 + n // 65000}.{n % 250} -d 10.255.1.{2 + n % 250} -p udp --sport {1 + n % 65000} --dport 8080"
        f" -t 600 -m {1 + n % 250}\n"
        for n in range(count)
    )
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(lines)
        file.flush()
        command = ["ip", "netns", "exec", namespace, "conntrack", "--load-file", file.name]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603


def _moved(container: Container, n: int) -> Container:
    assert container.address is not None  # noqa: S101
    return Container(Handle(f"new-{n}"), "", Stage.READY, container.app, container.address + 1000 + n, f"s-n{n}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("nft", "legacy"), default="nft")
    parser.add_argument("--policies", type=int, default=10_000)
    parser.add_argument("--containers", type=int, default=250)
    parser.add_argument("--flows", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    namespace = f"sbe-bench-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)  # noqa: S603, S607
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XTABLES_LOCKFILE"] = str(Path(folder) / "lock")
            asyncio.run(measure(namespace, arguments))
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)  # noqa: S603, S607


if __name__ == "__main__":
    main()
