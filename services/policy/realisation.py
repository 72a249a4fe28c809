"""Which cells enforce a revision of the policies: what the cells say of themselves, beside the leases they hold.

Every server hears every cell, so any of them can be asked. A cell that holds a lease is counted; one that has been
silent for ten seconds is unreachable, and what it enforces is not known. A cell enforces a revision when its kernel has
that one or a later one of the same database (epoch).
"""

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from bus import subjects
from bus.connection import Connection
from bus.decode import Malformed
from bus.messages import CELL_SILENT, CellName, CellState, Lease, Revision, cell_name
from bus.tables import LEASES, Publisher, Replica, Update
from bus.tables.publisher import Mirrored
from bus.wire import decode

log = logging.getLogger(__name__)

RESTORED_SECONDS = 30.0
"""For so long after a database was restored, a cell that is ahead of it is one that has not noticed yet."""
MAX_CELLS = 20_000
"""Cells that are remembered, of those that hold a lease and those that do not."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The last that a cell said, and when (monotonic)."""

    state: CellState
    at: float


@dataclass(frozen=True, slots=True)
class Status:
    """How far a revision has come. Cells that are behind have the revision that they enforce, None if of another epoch.

    Unreachable ones have how long they have been silent, None if they were never heard. `known`: the leases are those
    of a controller that answers; `bus`: the cells can be heard.
    """

    revision: Revision
    head: Revision
    enforcing: tuple[CellName, ...]
    behind: tuple[tuple[CellName, Revision | None, str], ...]
    unreachable: tuple[tuple[CellName, float | None], ...]
    known: bool
    bus: bool

    @property
    def realised(self) -> bool:
        """Whether every cell that can be reached enforces it, as far as can be known."""
        return self.known and self.bus and self.revision <= self.head and not self.behind


class Realisation:
    """Make it before the publisher runs; `run` it in a task."""

    def __init__(self, connection: Connection, publisher: Publisher[Any]) -> None:
        self._connection = connection
        self._publisher = publisher
        self._leases = Replica(connection, LEASES)
        self._cells: dict[CellName, Heard] = {}
        self._leased: dict[tuple[str, ...], CellName] = {}
        self._since = time.monotonic()
        self._changed = asyncio.Event()
        self._leases.listen(self._on_leases)
        connection.on_connect(self._on_connect)
        self._read = False
        self._restored_at = -math.inf
        publisher.listen(self._on_policies)

    @property
    def leases(self) -> Replica[Lease]:
        return self._leases

    @property
    def cells(self) -> frozenset[CellName] | None:
        """The cells that hold a lease; None while no controller says so."""
        return frozenset(self._leased.values()) if str(self._leases.state) == "live" else None

    async def run(self) -> None:
        """Listen for ever."""
        await self._connection.listen(subjects.cell("*", "state"), self._on_state)
        await self._leases.run()

    async def paced(self, most: float, least: float) -> None:
        """Return when something has changed since the call, after `least` seconds at least and `most` at most."""
        changed = self._changed
        await asyncio.sleep(least)
        try:
            async with asyncio.timeout(max(0.0, most - least)):
                await changed.wait()
        except TimeoutError:
            pass

    def status(self, revision: int | None = None) -> Status:
        """How far a revision, by default the latest, has come."""
        head = self._publisher.revision or Revision(0)
        wanted = head if revision is None else Revision(revision)
        now = time.monotonic()
        enforcing: list[CellName] = []
        behind: list[tuple[CellName, Revision | None, str]] = []
        unreachable: list[tuple[CellName, float | None]] = []
        for cell in sorted(set(self._leased.values())):
            heard = self._cells.get(cell)
            silent = now - (self._since if heard is None else max(heard.at, self._since))
            if silent > CELL_SILENT:
                unreachable.append((cell, None if heard is None else now - heard.at))
                continue
            if heard is None:
                behind.append((cell, None, "not heard of yet"))
                continue
            # A cell may be ahead of this server, by a change of another server's.
            ahead = heard.state.revision > head and now - self._restored_at < RESTORED_SECONDS
            same = heard.state.epoch == self._publisher.epoch and not ahead
            if same and heard.state.revision >= wanted:
                enforcing.append(cell)
            else:
                behind.append((cell, heard.state.revision if same else None, heard.state.problem))
        return Status(
            wanted,
            head,
            tuple(enforcing),
            tuple(behind),
            tuple(unreachable),
            known=str(self._leases.state) == "live" and self._publisher.revision is not None,
            bus=self._connection.connected,
        )

    def _on_state(self, subject: str, data: bytes) -> None:
        cell = cell_name(subject.split(".")[2])
        state = CellState.decode(decode(data, subject))
        before = self._cells.pop(cell, None)
        if len(self._cells) >= MAX_CELLS:
            raise Malformed(f"{subject}: {MAX_CELLS} cells are remembered already")
        self._cells[cell] = Heard(state, time.monotonic())
        if before is None or before.state != state:
            self._wake()

    def _on_leases(self, update: Update[Lease]) -> None:
        for key, lease in update.changes.items():
            if lease is None:
                self._leased.pop(key, None)
            else:
                self._leased[key] = lease.cell
        gone = self._cells.keys() - set(self._leased.values())
        now = time.monotonic()
        for cell in gone:
            if now - self._cells[cell].at > CELL_SILENT:
                del self._cells[cell]
        self._wake()

    def _on_policies(self, mirrored: Mirrored) -> None:
        if mirrored.reloaded and self._read:
            self._restored_at = time.monotonic()
        self._read = True
        self._wake()

    def _on_connect(self) -> None:
        # Nobody could be heard meanwhile: they get their time anew.
        self._since = time.monotonic()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
