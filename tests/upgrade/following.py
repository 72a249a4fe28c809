"""A cell that follows a table, as a process: prints the entries whenever they change, and leases a subnet first."""

import asyncio
import sys
from ipaddress import IPv4Address, IPv4Network

from tests.upgrade import next_version


async def follow(nats: str) -> None:
    from bus.connection import connect
    from bus.messages import cell_name
    from bus.tables import POLICIES, Replica
    from services.silk.client import LeaseClient

    name = cell_name("cell-9")
    async with connect(nats, role="cell", name=name) as connection:
        client = LeaseClient(connection, name, IPv4Address("10.0.0.9"), (IPv4Network("10.255.0.0/16"),), False)
        tenure = await client.acquire()
        print("leased", (await client.renew(tenure)).lease.subnet, flush=True)
        replica = Replica(connection, POLICIES, cache=None)
        replica.listen(lambda _: print("policies", sorted(replica.entries), flush=True))
        await replica.run()


if __name__ == "__main__":
    next_version.become()
    asyncio.run(follow(sys.argv[1]))
