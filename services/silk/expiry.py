"""Ending the leases of cells that are no more, and of no others.

A lease that was not renewed for its whole time is ended; its subnet then rests. The cell itself gave it up before
(services/silk/tenure.py), so nothing that lives is cut off, unless it is we who did not hear. Hence two guards:

- Nothing is ended before this controller has heard renewals for a while without interruption, so that every cell that
  lives must have renewed. Interrupted it is by its start, a loss of the bus or of the database, a pause of the process,
  and a jump of the database's clock.
- When more than a share of all leases is overdue, not renewed for half their time, then it is not the cells that are
  gone. Nothing is ended until they renew, or an operator says so (`silkbus silk expire`). Overdue and not expired ones
  are counted, since all that fell silent together expire one after the other.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable

from databases.core import Connection
from prometheus_client import Counter, Gauge

from bus.ledger import Change, Outcome
from bus.log import about
from bus.messages import Lease
from services.silk import census
from services.silk.census import Census
from services.silk.leases import LeaseStore
from services.silk.pool import Kind
from services.silk.schema import COLUMNS, lease_of

log = logging.getLogger(__name__)

MAX_INTERVAL = 10.0
MAX_CLOCK_ERROR = 5.0
"""Seconds by which the database's clock may differ from ours from one look to the next: it counts in seconds."""
LOW_SHARE = 0.1
ACTOR = "silk-controller"

EXPIRED = Counter("silkbus_silk_leases_expired_total", "Leases that were ended since they were not renewed")
REFUSED = Counter("silkbus_silk_mass_expiry_refused_total", "Times that leases were not ended since too many were due")
HELD_OFF = Gauge("silkbus_silk_expiry_held_off", "1 while leases that are due are not ended, since too many are")


class Hearing:
    """For how long renewals have been heard without interruption, on this machine's clock."""

    def __init__(self, needed: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._needed = needed
        self._clock = clock
        self._since = clock()

    def interrupted(self, why: str) -> None:
        if self.wait == 0:
            fields = about(reason=why, seconds=self._needed)
            log.info("no lease is ended before all cells could renew again", extra=fields)
        self._since = self._clock()

    @property
    def wait(self) -> float:
        """Seconds until all cells that live must have been heard; 0 if they must have been."""
        return max(0.0, self._since + self._needed - self._clock())


class Expiry:
    """Looks after the leases' end, and counts. `share` is that of all leases that may be overdue; one always may."""

    def __init__(
        self,
        store: LeaseStore,
        hearing: Hearing,
        *,
        share: float,
        connected: Callable[[], bool],
    ) -> None:
        self._store = store
        self._hearing = hearing
        self._share = share
        self._connected = connected
        self._interval = min(MAX_INTERVAL, store.terms.expiry / 4)
        self._looked: tuple[float, int] | None = None
        self._low: set[Kind] = set()
        self._trouble = ""
        self.problem: str | None = None
        """Why leases that are due are not ended, for `/readyz`."""

    async def run(self) -> None:
        """For ever. A database that is away only interrupts."""
        while True:
            try:
                await self.look()
                self._trouble = ""
            except Exception as error:  # noqa: BLE001 (each database driver has errors of its own)
                self._looked = None
                self._hearing.interrupted("the database failed")
                if self._trouble != repr(error):
                    self._trouble = repr(error)
                    log.warning("leases cannot be looked through", extra=about(error=self._trouble))
            await asyncio.sleep(self._interval)

    async def look(self) -> None:
        """Count the leases, and end those that are due if that may be. Raises what the database raises."""
        if not self._connected():
            self._hearing.interrupted("no connection to NATS")
        found = await census.take(self._store)
        found.show()
        self._compare_clocks(found.now)
        if found.ahead:
            await self._heal(found)
        self._warn_if_low(found)
        self._judge(found)
        if found.expired and self.problem is None and self._hearing.wait == 0:
            await self._end()

    def _compare_clocks(self, now: int) -> None:
        here = time.monotonic()
        before, self._looked = self._looked, (here, now)
        if before is None:
            return
        passed = here - before[0]
        if passed > 3 * self._interval + min(MAX_CLOCK_ERROR, self._interval):
            self._hearing.interrupted(f"nothing was done for {passed:.0f} s")
        elif abs(now - before[1] - passed) > MAX_CLOCK_ERROR:
            self._hearing.interrupted(f"the database's clock went {now - before[1]} s in {passed:.0f} s")

    async def _heal(self, found: Census) -> None:
        """Times that are yet to come would make leases, and rests, as much longer."""

        async def work(connection: Connection) -> None:
            for table, column in (("leases", "renewed_at"), ("former_leases", "released_at")):
                await connection.execute(
                    f"UPDATE {table} SET {column} = :now WHERE {column} > :late",  # noqa: S608 (our own names)
                    {"now": found.now, "late": found.now + MAX_CLOCK_ERROR},
                )

        await self._store.ledger.write(work)
        log.warning("the database's clock was set back", extra=about(times=found.ahead))

    def _judge(self, found: Census) -> None:
        allowed = max(1, math.floor(found.leases * self._share))
        too_many = found.overdue > allowed
        if not too_many or not found.expired:
            if self.problem is not None:
                log.info("leases are ended again", extra=about(leases=found.leases, overdue=found.overdue))
            self.problem = None
            HELD_OFF.set(0)
            return
        problem = (
            f"{found.overdue} of {found.leases} leases have not been renewed for half their time, and at most {allowed}"
            f" may be that: see whether cells reach the bus and the controllers; if those cells are no more, end their"
            f" leases with `silkbus silk expire`; until then the {found.expired} that are due are kept"
            + (f"; {found.outside} are not renewed since they are outside the pool" if found.outside else "")
        )
        if self.problem is None:
            log.error("leases are not ended, too many are due", extra=about(problem=problem))
        self.problem = problem
        REFUSED.inc()
        HELD_OFF.set(1)

    def _warn_if_low(self, found: Census) -> None:
        for kind, stock in found.stock.items():
            if stock.free >= stock.all * LOW_SHARE:
                self._low.discard(kind)
            elif kind not in self._low:
                self._low.add(kind)
                fields = about(kind=kind, all=stock.all, free=stock.free, resting=stock.resting)
                log.warning("subnets are running out: add a network to overlay_network", extra=fields)

    async def _end(self) -> None:
        outcome = await end_expired(self._store, ACTOR)
        for lease in outcome.result or ():
            EXPIRED.inc()
            log.warning("lease expired", extra=about(subnet=str(lease.subnet), cell=lease.cell))


async def end_expired(store: LeaseStore, actor: str) -> Outcome[list[Lease]]:
    """End all leases whose time is over. Those that are renewed at this moment are not."""

    async def work(change: Change) -> list[Lease]:
        due = (
            f"SELECT {COLUMNS} FROM leases WHERE {store.ends_at} < {store.clock}"  # noqa: S608
            f" ORDER BY subnet{store.lock}"
        )
        leases = [lease_of(row) for row in await change.database.fetch_all(due)]
        for lease in leases:
            await store.remove(change, lease, expired=True)
        return leases

    return await store.commit(work, actor)
