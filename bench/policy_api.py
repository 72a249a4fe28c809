"""The policy API over HTTP on loopback: requests a second, and how long they take, with 10 000 policies present.

    .venv/bin/python bench/policy_api.py [--postgresql] [--policies N] [--seconds S] [--connections N]

One server process, plain HTTP, tokens from a file, the bus away. The clients share the machine with it: they write raw
HTTP, so that they take little of it. Lists are of all policies, of one app, and with the ETag of the last answer;
`list while changing` has one connection that makes and deletes policies all the while.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.databases import PostgreSQL, running
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer, body, policy

Ask = Callable[[], bytes]


def request(method: str, path: str, content: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", f"Authorization: {ADMIN_TOKEN}", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, message: bytes) -> tuple[bytes, int]:
        """The answer's head, and the length of its body."""
        self._writer.write(message)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if head[9:12] not in (b"200", b"304"):
            raise RuntimeError(head.decode())
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or 0)
        await self._reader.readexactly(length)
        return head, length

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def clients(server: PolicyServer, count: int) -> AsyncIterator[list[Client]]:
    address = server.listener.getsockname()
    made = [Client(*await asyncio.open_connection(*address, limit=1 << 24)) for _ in range(count)]
    try:
        yield made
    finally:
        for client in made:
            client.close()


async def measure(name: str, made: list[Client], ask: Ask, seconds: float) -> None:
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def one(client: Client) -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            await client.send(ask())
            times.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*map(one, made))
    rate = len(times) / (time.perf_counter() - started)
    times.sort()
    p50, p99 = (1000 * times[int(len(times) * part)] for part in (0.5, 0.99))
    print(f"{name:32} {len(made):3} connections  {rate:8.1f}/s  p50 {p50:7.1f} ms  p99 {p99:7.1f} ms", flush=True)


def encoded(*items: object) -> bytes:
    return json.dumps(body(*items)).encode()


def changes() -> Iterator[bytes]:
    for number in itertools.count():
        item = encoded(policy("changing", f"other-{number % 50}"))
        yield request("POST", POLICIES, item)
        yield request("POST", DELETE, item)


async def bench(server: PolicyServer, policies: int, seconds: float, connections: int) -> None:
    apps = max(policies // 10, 1)
    with server.client() as admin:
        for start in range(0, policies, 2000):
            many = (
                policy(f"{number % apps:08d}-0000-4000-8000-000000000000", f"{number % 997:08d}", 1 + number // apps)
                for number in range(start, min(start + 2000, policies))
            )
            admin.post(POLICIES, json=body(*many)).raise_for_status()
        size = len(admin.get(POLICIES).content)
    print(f"{policies} policies; a list of all of them has {size / 1e6:.1f} MB")
    numbers = itertools.count()

    def create(count: int = 1) -> bytes:
        number = next(numbers)
        return request(
            "POST", POLICIES, encoded(*(policy(f"new-{number % 500}", f"x{i}", 1 + number) for i in range(count)))
        )

    async with clients(server, connections) as made:
        one = made[:1]
        head, _ = await made[0].send(request("GET", POLICIES))
        tag = head.decode().lower().partition("etag: w/")[2].partition("\r")[0]
        for some in (one, made):
            await measure("list all", some, lambda: request("GET", POLICIES), seconds)
            await measure("list all, unchanged (304)", some, unchanged(tag), seconds)
            await measure(
                "list of one app",
                some,
                lambda: request("GET", f"{POLICIES}?id=00000007-0000-4000-8000-000000000000"),
                seconds,
            )
            await measure("list of no app", some, lambda: request("GET", f"{POLICIES}?id=nobody"), seconds)
        stop = asyncio.create_task(change_for_ever(server))
        await measure("list all while changing", made[1:], lambda: request("GET", POLICIES), seconds)
        stop.cancel()
        await asyncio.gather(stop, return_exceptions=True)
        for some in (one, made):
            await measure("create 1", some, create, seconds)
        await measure("create 100", one, lambda: create(100), seconds)


def unchanged(tag: str) -> Ask:
    return lambda: request("GET", POLICIES, b"", f"If-None-Match: W/{tag}")


async def change_for_ever(server: PolicyServer) -> None:
    async with clients(server, 1) as (client,):
        for change in changes():
            await client.send(change)


@contextmanager
def database(postgresql: bool) -> Iterator[dict[str, str]]:
    if not postgresql:
        yield {}
        return
    with running(PostgreSQL) as server:
        server.sql("CREATE DATABASE bench")
        yield {"database": server.url("bench")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgresql", action="store_true", help="a PostgreSQL server of its own; else SQLite")
    parser.add_argument("--policies", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=20)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silkbus-bench-")))
        settings = stack.enter_context(database(options.postgresql))
        server = PolicyServer(folder, log_level="warning", **settings)
        stack.callback(server.close)
        server.start()
        print("PostgreSQL" if options.postgresql else "SQLite")
        asyncio.run(bench(server, options.policies, options.seconds, options.connections))


if __name__ == "__main__":
    main()
