"""Says on the bus which revision of the policies this cell's kernel has, so that the centre can tell who is behind.

At once after each pass that changed what is to be said, at most five times a second, the last word last; and every few
seconds anyway, so that silence means something. Nothing waits for it: what is not sent is overtaken by the next.
"""

import asyncio
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from bus import subjects
from bus.connection import Connection
from bus.messages import CellName, CellState, Revision, cell_name
from bus.tables import Replica, Update
from services.enforcer.reconciler import Reconciler

INTERVAL = 0.2
"""Seconds between two reports at least."""
KEEP_ALIVE = 4.0
"""Seconds between two reports at most; who is silent for bus.messages.CELL_SILENT is taken for unreachable."""
KEPT_EPOCHS = 1000


class Reporter:
    """Reports for one cell. Make it before the replica runs; `run` it in a task."""

    def __init__(self, connection: Connection, cell: str, policies: Replica[Any], reconciler: Reconciler) -> None:
        self._connection = connection
        self._cell: CellName = cell_name(cell)
        self._policies = policies
        self._reconciler = reconciler
        self._wake = asyncio.Event()
        self._epochs: OrderedDict[Revision, str] = OrderedDict()
        """Of the latest revisions: after a restore the kernel has one of the old epoch while the replica is ahead."""
        policies.listen(self._note)
        reconciler.on_pass(self._wake.set)
        connection.on_connect(self._wake.set)

    async def run(self) -> None:
        """Report for ever."""
        said: CellState | None = None
        said_at = time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, said_at + KEEP_ALIVE - time.monotonic())):
                    await self._wake.wait()
            self._wake.clear()
            state = self._state()
            # Passes come each second, mostly with nothing new.
            if state != said or time.monotonic() >= said_at + KEEP_ALIVE:
                said, said_at = state if await self._send(state) else None, time.monotonic()
                await asyncio.sleep(INTERVAL)

    def _note(self, update: Update[Any]) -> None:
        self._epochs[update.revision] = self._policies.epoch
        self._epochs.move_to_end(update.revision)
        if len(self._epochs) > KEPT_EPOCHS:
            self._epochs.popitem(last=False)

    def _state(self) -> CellState:
        revision = self._reconciler.revision
        return CellState(
            epoch=self._epochs.get(revision, ""),
            revision=revision,
            table=str(self._policies.state),
            problem=(self._reconciler.problem or "")[:200],
        )

    async def _send(self, state: CellState) -> bool:
        return await self._connection.publish(subjects.cell(self._cell, "state"), state.encode())
