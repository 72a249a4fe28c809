"""One server of several: `python -m tests.bus.ledger_writer URL PREFIX COUNT` makes COUNT changes, all at once.

Prints `ready` when the schema is there, starts when it reads a line, and prints `NAME REVISION` for each change as it
is answered.
"""

import asyncio
import sys

from bus.database import open_database
from tests.bus.tables import Notes


async def main(url: str, prefix: str, count: int) -> None:
    async with open_database(url) as database:
        notes = Notes(database)
        await notes.migrate()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

        async def one(number: int) -> None:
            # Each fourth also takes the place of what all others write.
            shared = {"shared": f"{prefix}{number}"} if number % 4 == 0 else {}
            outcome = await notes.write({f"{prefix}{number}": prefix, **shared})
            print(f"{prefix}{number} {outcome.revision}", flush=True)

        await asyncio.gather(*(one(number) for number in range(count)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
