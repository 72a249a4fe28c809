"""T11: how long it takes to create policies, with 10 000 present, on each kind of database.

    python -m bench.policy_store [--kind sqlite|postgresql|mysql …] [--rounds N]

In the store alone, and over HTTP with a server of its own; one request after the other. `longest` is how long the event
loop did nothing else during a request of 10 000 policies. Servers come from Debian's packages (.ci/setup-tests).
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from bus.database_options import DatabaseOptions
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy.migrate import open_ledger
from services.policy.store import Filter, Store
from services.policy.tag_pool import TagPool
from tests.databases import KINDS, MariaDB, PostgreSQL, running
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer, body, policy

PRESENT = 10_000
APPS = [str(uuid.uuid5(uuid.NAMESPACE_DNS, str(number))) for number in range(1000)]

Create = Callable[[Sequence[Policy]], Awaitable[object]]


def made(first: int, count: int) -> list[Policy]:
    """Policies that differ from those of every other range of numbers."""
    return [
        Policy(AppId(APPS[n % 1000]), AppId(APPS[(n * 7 + n // 1000) % 1000]), Ports(Protocol.TCP, port, port))
        for n in range(first, first + count)
        for port in (1 + n // 1000,)
    ]


@contextmanager
def database(kind: str) -> Iterator[str]:
    """The URL of a new one."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{folder}/policy.db"
        return
    with running(PostgreSQL if kind == "postgresql" else MariaDB) as server:
        server.sql("CREATE DATABASE bench")
        yield server.url("bench")


async def measure(label: str, create: Create, delete: Create, rounds: int) -> None:
    await create(made(0, PRESENT))
    start = PRESENT
    for count, times in ((1, rounds), (100, rounds // 4)):
        took = []
        for _ in range(times):
            wanted = made(start, count)
            start += count
            began = time.perf_counter()
            await create(wanted)
            took.append(1000 * (time.perf_counter() - began))
            await delete(wanted)
        took.sort()
        p50, p99 = took[len(took) // 2], took[min(len(took) - 1, len(took) * 99 // 100)]
        print(f"{label:24} create {count:6}   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   ({times} times)", flush=True)


async def in_store(kind: str, url: str, rounds: int) -> None:
    async with open_ledger(url, DatabaseOptions()) as ledger:
        store = Store(ledger, TagPool(rest=0, clock=time.time), lambda _: None)

        async def create(wanted: Sequence[Policy]) -> object:
            return await store.create(wanted, actor="bench")

        async def delete(wanted: Sequence[Policy]) -> object:
            return await store.delete(wanted, actor="bench")

        await measure(f"{kind}, store", create, delete, rounds)
        many = made(10**6, 10_000)
        for name, request in (("create", create(many)), ("list", store.list(Filter())), ("delete", delete(many))):
            longest, began = 0.0, time.perf_counter()
            task = asyncio.ensure_future(request)
            while not task.done():
                before = time.perf_counter()
                await asyncio.sleep(0.0005)
                longest = max(longest, time.perf_counter() - before)
            took = 1000 * (time.perf_counter() - began)
            print(
                f"{kind + ', store':24} {name} 10000   {took:11.1f} ms   longest {1000 * longest:6.1f} ms", flush=True
            )


async def over_http(kind: str, url: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = PolicyServer(Path(folder), database=url)
        await asyncio.to_thread(server.start)
        try:
            headers = {"Authorization": f"bearer {ADMIN_TOKEN}", "Content-Type": "application/json"}
            async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:

                async def post(path: str, wanted: Sequence[Policy]) -> None:
                    items = (policy(item.source, item.destination, item.ports.start) for item in wanted)
                    (await client.post(path, content=json.dumps(body(*items)))).raise_for_status()

                await measure(f"{kind}, HTTP", lambda w: post(POLICIES, w), lambda w: post(DELETE, w), rounds)
        finally:
            server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be given again; all of them by default")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    for kind in arguments.kind or KINDS:
        for bench in (in_store, over_http):
            with database(kind) as url:
                asyncio.run(bench(kind, url, arguments.rounds))


if __name__ == "__main__":
    main()
