"""A relay as a process of its own, to be killed: `python -m tests.bus.relay_process NATS_URL DATABASE_URL`."""

import asyncio
import sys

from bus.connection import connect
from bus.database import open_database
from bus.events import Relay
from bus.ledger import Ledger
from bus.log import setup


async def main(nats: str, database_url: str) -> None:
    setup("relay")
    async with open_database(database_url) as database, connect(nats, role="server", name="relay") as connection:
        await Relay(connection, Ledger(database, "notes")).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
