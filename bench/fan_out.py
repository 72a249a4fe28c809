"""From one policy server to all cells: `python -m bench.fan_out [--full] [--database URL]`.

Measures, over one real nats-server on this machine, the time from a change's commit in SQL to each cell having applied
it, and how long all cells need to be in sync after they start with nothing and after nats-server was killed and started
again. The policy server is the product's store, ledger and publisher, without HTTP, in this process; what is simulated
of the cells, bench/simulated_cells.py says. `--full` is the size of the target: 20 000 apps, 60 000 policies, 1 000
cells at 5 changes a second, 50 full replicas at 20.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from bus.connection import DROPPED, connect
from bus.database import open_database
from bus.ledger import Ledger, Outcome
from bus.log import setup
from bus.messages import AppId, Policy, Ports, Protocol
from bus.tables import POLICIES, Publisher
from bus.tables.publisher import ANSWERED
from services.policy.schema import MIGRATIONS
from services.policy.store import Store, entries
from services.policy.tag_pool import TagPool
from tests.nats_server import NatsServer

SMALL = {"apps": 2_000, "policies": 6_000, "cells": 100, "replicas": 6, "seconds": 8}
FULL = {"apps": 20_000, "policies": 60_000, "cells": 1_000, "replicas": 50, "seconds": 30}
CELLS_RATE, REPLICAS_RATE = 5.0, 20.0
KINDS = ("snapshot", "changes", "current", "busy")
BATCH = 2_000
ANSWER_TIMEOUT = 330


class PolicyServer:
    """The centre, and when it committed what."""

    def __init__(self, store: Store, ledger: Ledger, publisher: Publisher[object]) -> None:
        self.store, self.ledger, self.publisher = store, ledger, publisher
        self.commits: dict[int, float] = {}

    @classmethod
    @asynccontextmanager
    async def running(cls, nats: str, database: str) -> AsyncIterator["PolicyServer"]:
        async with (
            open_database(database) as opened,
            connect(nats, role="policy-server", name="bench") as connection,
            asyncio.TaskGroup() as tasks,
        ):
            ledger = Ledger(opened, POLICIES.name)
            await ledger.migrate(MIGRATIONS)
            publisher: Publisher[object] = Publisher(connection, ledger, POLICIES, entries)

            def committed(outcome: Outcome[None]) -> None:
                server.commits[outcome.revision] = time.monotonic()
                publisher.committed(outcome)

            pool = TagPool(rest=0, clock=time.time)
            server = cls(Store(ledger, pool, committed), ledger, publisher)
            publishing = tasks.create_task(publisher.run())
            yield server
            publishing.cancel()

    async def fill(self, apps: list[AppId], count: int) -> None:
        begun = time.monotonic()
        chance = random.Random(1)  # noqa: S311 (the same policies each time)
        pairs = {(app, chance.choice(apps)) for app in apps}
        while len(pairs) < count:
            pairs.add((chance.choice(apps), chance.choice(apps)))
        wanted = [Policy(*pair, Ports(Protocol.TCP, 8080, 8080)) for pair in sorted(pairs)]
        for start in range(0, len(wanted), BATCH):
            await self.store.create(wanted[start : start + BATCH], actor="bench")
        print(
            f"table of {len(wanted)} policies of {len(apps)} apps made in {time.monotonic() - begun:.1f} s", flush=True
        )

    async def change(self, apps: list[AppId], rate: float, seconds: float) -> dict[int, float]:
        """Add and remove policies at this rate; the changes' revisions with the times of their commits."""
        self.commits.clear()
        begun = time.monotonic()
        count = round(rate * seconds)
        for number in range(count):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            policy = Policy(apps[number // 2], apps[-1 - number // 2], Ports(Protocol.TCP, 9999, 9999))
            await (self.store.delete if number % 2 else self.store.create)([policy], actor="bench")
        print(f"  {count} changes in {time.monotonic() - begun:.1f} s", flush=True)
        return dict(self.commits)


class Cells:
    """The simulated cells, in some processes."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self.processes = processes

    @classmethod
    @asynccontextmanager
    async def running(cls, url: str, count: int, kind: str, processes: int) -> AsyncIterator["Cells"]:
        shares = [len(range(index, count, processes)) for index in range(processes)]
        started = []
        for index, share in enumerate(shares):
            command = [sys.executable, "-m", "bench.simulated_cells", url, str(sum(shares[:index])), str(share), kind]
            pipe = asyncio.subprocess.PIPE
            started.append(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 30))
        try:
            yield cls(started)
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def applied(self, commits: dict[int, float]) -> tuple[dict[int, list[float]], dict[str, float]]:
        """When all have the last of these revisions: each cell's seconds since each commit; reasons of fetches."""
        latencies: dict[int, list[float]] = {revision: [] for revision in commits}
        asked: dict[str, float] = {}
        for answer in await asyncio.gather(*(self._ask(process, commits) for process in self.processes)):
            for revision, seconds in answer["latencies"].items():
                latencies[int(revision)] += seconds
            for reason, times in answer["asked"].items():
                asked[reason] = asked.get(reason, 0) + times
        return latencies, asked

    async def _ask(
        self, process: asyncio.subprocess.Process, commits: dict[int, float]
    ) -> dict[str, dict[str, object]]:
        assert process.stdin is not None  # noqa: S101 (for the type checker: both are pipes)
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(json.dumps({"commits": commits}).encode() + b"\n")
        async with asyncio.timeout(ANSWER_TIMEOUT):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError("a process of simulated cells has ended; its errors are above")
        return json.loads(line)


class Usage:
    """Processor time that cells, policy server and NATS have taken since this was made, and what was asked."""

    def __init__(self, cells: Cells, nats: NatsServer) -> None:
        self._pids = {"cells": [process.pid for process in cells.processes], "policy server": [os.getpid()]}
        if nats.process is not None:
            self._pids["NATS"] = [nats.process.pid]
        self._begun = time.monotonic()
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        times = {who: sum(map(cpu_seconds, pids)) for who, pids in self._pids.items()}
        answered = {f"answers {kind}": ANSWERED.labels(POLICIES.name, kind)._value.get() for kind in KINDS}
        return times | answered | {"messages dropped": DROPPED._value.get()}

    def __str__(self) -> str:
        seconds = time.monotonic() - self._begun
        spent = {what: value - self._before[what] for what, value in self._now().items()}
        cpu = [f"{who} {spent[who] / seconds * 100:.0f} %" for who in self._pids]
        counts = [f"{what} {value:.0f}" for what, value in spent.items() if what not in self._pids and value]
        return f"CPU of a core: {', '.join(cpu)}; {', '.join(counts) or 'no fetches'}"


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(values: list[float]) -> str:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return (
        f"p50 {statistics.median(ordered) * 1000:7.1f} ms   p99 {p99 * 1000:7.1f} ms   max {ordered[-1] * 1000:7.1f} ms"
    )


async def phase(server: PolicyServer, nats: NatsServer, arguments: argparse.Namespace, count: int, kind: str) -> None:
    rate = CELLS_RATE if kind == "light" else REPLICAS_RATE
    print(f"\n{count} {kind} cells in {arguments.processes} processes", flush=True)
    apps = arguments.app_ids
    revision = int(server.publisher.revision or 0)
    begun = time.monotonic()
    async with Cells.running(nats.url, count, kind, arguments.processes) as cells:
        usage = Usage(cells, nats)
        latencies, _ = await cells.applied({revision: begun})
        print(f"  started with nothing, all in sync after {max(latencies[revision]):.2f} s ({usage})", flush=True)

        usage = Usage(cells, nats)
        commits = await server.change(apps, rate, arguments.seconds)
        latencies, asked = await cells.applied(commits)
        print(f"  {rate:g} changes/s, commit to each cell: {figures([s for per in latencies.values() for s in per])}")
        print(
            f"  {rate:g} changes/s, commit to last cell: {figures([max(per) for per in latencies.values()])} ({usage})"
        )
        print(f"  resyncs so far: {asked}", flush=True)

        nats.stop()
        await asyncio.sleep(1)
        missed = await server.change(apps, rate, 1)  # what all must fetch
        nats.start()
        up, usage = time.monotonic(), Usage(cells, nats)
        latencies, asked = await cells.applied({max(missed): up})
        print(f"  nats-server killed and started, back in sync: {figures(latencies[max(missed)])} ({usage})")
        print(f"  resyncs so far: {asked}", flush=True)


async def main(arguments: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silkbus-bench-")))
        nats = NatsServer(folder)
        nats.start()
        stack.callback(nats.stop)
        database = arguments.database or f"sqlite:///{folder}/policy.db"
        server = await stack.enter_async_context(PolicyServer.running(nats.url, database))
        chance = random.Random(2)  # noqa: S311 (the same names each time)
        arguments.app_ids = [AppId(str(uuid.UUID(int=chance.getrandbits(128)))) for _ in range(arguments.apps)]
        await server.fill(arguments.app_ids, arguments.policies)
        await phase(server, nats, arguments, arguments.cells, "light")
        await phase(server, nats, arguments, arguments.replicas, "full")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="From one policy server to all cells.")
    parser.add_argument("--full", action="store_true", help="the size of the target; takes some minutes")
    parser.add_argument("--database", help="SQL database, as a URL; a new SQLite file otherwise")
    parser.add_argument("--processes", type=int, default=2, help="processes that share the simulated cells")
    for name, value in SMALL.items():
        parser.add_argument(f"--{name}", type=int, help=f"{value}, with --full {FULL[name]}")
    given = parser.parse_args()
    for name, value in (FULL if given.full else SMALL).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    setup("bench", "error")
    began = time.monotonic()
    asyncio.run(main(given))
    print(f"\nwhole bench: {time.monotonic() - began:.0f} s on {os.cpu_count()} cores")
