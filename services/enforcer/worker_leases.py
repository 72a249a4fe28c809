"""Leases as this cell's silk worker has them, from the original's controller: then there are none on the bus.

Asked for every few seconds on its socket: the worker itself hears of them by asking, too (contract/cell.md 5.4). While
it does not answer, those heard last count.
"""

import asyncio
import logging
from collections.abc import Callable

from bus.decode import Fields, Malformed
from bus.local import Refused, Service, Unreachable
from bus.log import about
from bus.messages import Lease, Revision, lease_key
from bus.tables import Update
from bus.tables.follower import State

log = logging.getLogger(__name__)

INTERVAL = 2.0


class WorkerLeases:
    """In place of a replica of the table: `listen`, `run` in a task, `usable`."""

    def __init__(self, worker: Service) -> None:
        self._worker = worker
        self._listeners: list[Callable[[Update[Lease]], None]] = []
        self._known = asyncio.Event()
        self._problem: str | None = None
        self.entries: dict[tuple[str, ...], Lease] = {}
        self.revision = Revision(0)
        self.state = State.STARTING

    def listen(self, listener: Callable[[Update[Lease]], None]) -> None:
        self._listeners.append(listener)

    async def usable(self) -> None:
        """Return once the worker has said them, however long: until then the rules that stand are better than none."""
        await self._known.wait()

    async def run(self) -> None:
        """Run for ever."""
        while True:
            try:
                answer = Fields(await self._worker.call("GET", "/leases"), "silk worker's leases")
                heard = [Lease.decode(item) for item in answer.items("leases")]
            except (Unreachable, Refused, Malformed) as error:
                if str(error) != self._problem:
                    log.warning("the silk worker's leases are not to be had", extra=about(error=str(error)))
                    self._problem = str(error)
            else:
                self._problem = None
                self._take({lease_key(lease.subnet): lease for lease in heard})
            await asyncio.sleep(INTERVAL)

    def _take(self, entries: dict[tuple[str, ...], Lease]) -> None:
        changes: dict[tuple[str, ...], Lease | None] = {
            key: entries.get(key)
            for key in self.entries.keys() | entries.keys()
            if self.entries.get(key) != entries.get(key)
        }
        self.entries, self.state = entries, State.LIVE
        if changes:
            self.revision = Revision(self.revision + 1)
            for listener in self._listeners:
                listener(Update(self.revision, changes))
        self._known.set()
