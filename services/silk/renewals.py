"""Renewals, many in one transaction.

After an outage all cells renew at once, each a transaction of its own with a wait for the disk. Those that come while
one is being written go together into the next, and so a thousand cost a few. A renewal only moves a time: it is no
change of the table, has no revision, and reaches nobody.
"""

import asyncio
from collections.abc import Sequence

from databases.core import Connection

from bus.ledger import Ledger
from bus.messages import Lease
from services.silk.schema import CLOCK, COLUMNS, LOCK, lease_of

AT_ONCE = 256


class Renewals:
    """Notes that cells still have the very leases they say."""

    def __init__(self, ledger: Ledger, expiry: int) -> None:
        """`expiry`: for how many seconds cells are told that a renewal holds."""
        self._ledger = ledger
        self._expiry = expiry
        dialect = ledger.database.url.dialect
        self._clock, self._lock = CLOCK[dialect], LOCK[dialect]
        self._waiting: list[tuple[Lease, asyncio.Future[bool]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def renew(self, lease: Lease) -> bool:
        """False if it is not there just so: it is another's, or was released. Raises what the database raises."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((lease, answer))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        return await answer

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            try:
                held = await self._ledger.write(lambda connection, batch=batch: self._write(connection, batch))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001 (each database driver has errors of its own)
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for lease, answer in batch:
                if not answer.done():
                    answer.set_result(lease in held)

    async def _write(self, connection: Connection, batch: Sequence[tuple[Lease, object]]) -> set[Lease]:
        wanted = {lease for lease, _ in batch}
        # In one order for all, so that controllers wait for each other and do not block each other.
        names, values = _list(sorted({str(lease.subnet) for lease in wanted}))
        rows = await connection.fetch_all(
            f"SELECT {COLUMNS} FROM leases WHERE subnet IN ({names}) ORDER BY subnet{self._lock}",  # noqa: S608
            values,
        )
        held = wanted.intersection(map(lease_of, rows))
        if held:
            names, values = _list(sorted(str(lease.subnet) for lease in held))
            await connection.execute(
                f"UPDATE leases SET renewed_at = {self._clock}, expires_in = {self._expiry} WHERE subnet IN ({names})",  # noqa: S608
                values,
            )
        return held


def _list(items: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Parameters for `IN (…)`, repeated up to a power of two: databases keep plans of few different statements."""
    size = 1 << (len(items) - 1).bit_length()
    padded = [*items, *[items[-1]] * (size - len(items))]
    values = {f"s{number}": item for number, item in enumerate(padded)}
    return ", ".join(f":{name}" for name in values), values
