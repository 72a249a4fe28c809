"""Keeping what the worker made in the kernel as it made it, whatever others do there.

The watch tells what to look at, the kernel thread looks and mends, and the entries for other cells are left to those
who know what they must be (`looked`). Everything is looked at now and then all the same: no cell shall depend on a
notice that nobody thought of.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from prometheus_client import Counter
from tenacity import AsyncRetrying

from bus.log import about
from bus.process import KernelThread
from services.silk.network import CellNetwork, Inspection
from services.silk.watch import Noticed, Watch

log = logging.getLogger(__name__)

LOOK_INTERVAL = 300.0
SETTLE = 0.05
"""Seconds to wait for the rest after a first notice: deleting a device tells of each of its entries."""
REST = 0.2
"""Seconds between two looks, so that somebody who insists costs little."""

REPAIRS = Counter("silkbus_silk_repairs_total", "Things in the kernel that others had changed and were put right")


class Mender:
    """Looks when there is reason to, and now and then. `looked` is told what was found, each time."""

    def __init__(
        self,
        network: CellNetwork,
        kernel: KernelThread,
        looked: Callable[[Inspection], None],
        retrying: Callable[[], AsyncRetrying],
    ) -> None:
        self._network = network
        self._kernel = kernel
        self._looked = looked
        self._retrying = retrying
        self._wake = asyncio.Event()
        self.problem: str | None = None

    async def run(self) -> None:
        """Run for ever."""
        watch = await self._kernel.run(self._network.watch)
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(watch.fileno(), lambda: self._wake.set() if watch.read() else None)
            noticed = Noticed(all=True)  # what was changed before there was a watch
            while True:
                async for attempt in self._retrying():
                    with attempt:
                        await self._look(noticed)
                await asyncio.sleep(REST)
                noticed = await self._next(watch)
        finally:
            loop.remove_reader(watch.fileno())
            watch.close()

    async def _next(self, watch: Watch) -> Noticed:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_INTERVAL):
                await self._wake.wait()
            await asyncio.sleep(SETTLE)
            self._wake.clear()
            return watch.take()
        return Noticed(all=True)

    async def _look(self, noticed: Noticed) -> None:
        try:
            found = await self._kernel.run(self._network.inspect, noticed)
        except Exception as error:
            self.problem = str(error)
            raise
        self.problem = None
        if found.mended:
            REPAIRS.inc(len(found.mended))
            log.warning("somebody else changed what is ours: mended", extra=about(mended=found.mended))
        self._looked(found)
