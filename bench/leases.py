"""How many lease requests a controller's store answers, with CELLS leases, on each kind of database.

    python -m bench.leases [--kind sqlite|postgresql|mysql …] [--cells N]

`acquire` is of new leases, one after the other and all at once; `renew` of all, one after the other, and all at once as
after an outage; `list` is what the original's daemons poll for. Servers come from Debian's packages.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Iterable
from ipaddress import IPv4Address, IPv4Network

from bench.policy_store import database
from bus.database_options import DatabaseOptions
from bus.messages import CellName, Lease
from services.silk.leases import LeaseStore, Terms
from services.silk.migrate import open_ledger
from services.silk.pool import Pool
from tests.databases import KINDS

POOL = Pool((IPv4Network("10.0.0.0/8"),), 24)
RENEWED_IN_A_ROW = 200


def say(what: str, count: int, began: float) -> None:
    taken = time.perf_counter() - began
    print(
        f"  {what:24} {count / taken:8.0f} a second   {taken / count * 1000:7.2f} ms each   {taken:6.2f} s", flush=True
    )


async def in_a_row(asks: Iterable[Awaitable[object]]) -> None:
    for ask in asks:
        await ask


async def measure(url: str, cells: int) -> None:
    async with open_ledger(url, DatabaseOptions()) as ledger:
        store = LeaseStore(ledger, Terms(POOL, 7 * 86_400))
        first = IPv4Address("172.16.0.1")
        leases: list[Lease] = []

        async def acquire(number: int) -> None:
            nonlocal leases
            outcome = await store.acquire(CellName(f"cell-{number}"), first + number)
            leases += [outcome.result] if outcome.result else []

        half = cells // 2
        began = time.perf_counter()
        await in_a_row(acquire(number) for number in range(half))
        say("acquire, in a row", half, began)
        began = time.perf_counter()
        await asyncio.gather(*(acquire(number) for number in range(half, cells)))
        say("acquire, all at once", cells - half, began)
        began = time.perf_counter()
        await in_a_row(store.renew(lease) for lease in leases[:RENEWED_IN_A_ROW])
        say("renew, in a row", min(RENEWED_IN_A_ROW, cells), began)
        began = time.perf_counter()
        await asyncio.gather(*(store.renew(lease) for lease in leases))
        say("renew, all at once", cells, began)
        began = time.perf_counter()
        await in_a_row(store.all() for _ in range(20))
        say("list", 20, began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--cells", type=int, default=1000)
    arguments = parser.parse_args()
    for kind in arguments.kind or KINDS:
        print(f"{kind}, {arguments.cells} cells", flush=True)
        with database(kind) as url:
            asyncio.run(measure(url, arguments.cells))


if __name__ == "__main__":
    main()
