"""Cells of the fan-out bench, many in one process: `python -m bench.simulated_cells NATS-URL FIRST COUNT full|light`.

Each cell has its own connection to NATS, its own subscriptions, and the product's `Replica`, which decides and asks as
on a real cell, without a cache on disk. A `full` one keeps its own entries, decoded, as an enforcer's does. Of `light`
ones 1 000 fit on one machine: those of one process share one content, so what a real cell does a second time for itself
(unpacking a snapshot, updating the digest) is done once for all.

Reads one JSON line per question, {"commits": {revision: time}}, waits until all cells have the last of these revisions,
and answers with {"latencies": {revision: [seconds…]}, "asked": {reason: times}}; times are of the monotonic clock.
"""

import asyncio
import functools
import json
import sys
import time
from bisect import bisect_left
from contextlib import AsyncExitStack
from typing import Any

import bus.tables.replica
from bus.connection import connect
from bus.log import setup
from bus.messages import Revision
from bus.tables import POLICIES, Replica, Update
from bus.tables.follower import RESYNCS, Follower
from bus.tables.table import Changes, Content, unpack_changes

APPLIED_TIMEOUT = 300


class SharedContent:
    """What all light cells of this process hold, and its digest at each revision that one of them has reached."""

    content = Content()
    digests: dict[tuple[str, int], bytes] = {}  # noqa: RUF012 (one for the process)

    @classmethod
    def load(cls, epoch: str, revision: Revision, data: bytes) -> None:
        if (epoch, revision) not in cls.digests:
            entries = dict(unpack_changes(data, "snapshot"))
            cls.content = Content.of(epoch, revision, {k: v for k, v in entries.items() if v is not None})
            cls.digests[epoch, revision] = cls.content.digest

    @classmethod
    def apply(cls, revision: Revision, changes: Changes) -> None:
        if (cls.content.epoch, revision) not in cls.digests and revision > cls.content.revision:
            cls.content.apply(revision, changes)
            cls.digests[cls.content.epoch, revision] = cls.content.digest


class LightFollower(Follower[Any]):
    """A follower that keeps its position only."""

    def _on_snapshot(self, epoch: str, revision: Revision, _: bytes, data: bytes, seen_at: float, now: float) -> None:
        if epoch == self.content.epoch and revision < self.revision:
            return
        SharedContent.load(epoch, revision, data)
        self._be_at(epoch, revision)
        self._confirm(now, seen_at)

    def _apply(self, revision: Revision, changes: Changes) -> None:
        SharedContent.apply(revision, changes)
        self._be_at(self.content.epoch, revision)

    def _be_at(self, epoch: str, revision: Revision) -> None:
        # A revision that the shared content has jumped over has no digest here: the next heartbeat then differs, and
        # the cell takes the whole table. The bench prints how often that happened.
        digest = SharedContent.digests.get((epoch, revision), b"")
        self.content = Content(epoch, revision, {}, int.from_bytes(digest, "big"))
        self._emit(Update(revision, {}))


class Cell:
    def __init__(self) -> None:
        self.revisions: list[int] = []
        self.times: list[float] = []

    def applied(self, update: Update[Any]) -> None:
        if not self.revisions or update.revision > self.revisions[-1]:
            self.revisions.append(update.revision)
            self.times.append(time.monotonic())

    def reached(self, revision: int) -> float | None:
        """When it first had this revision, or a later one."""
        index = bisect_left(self.revisions, revision)
        return self.times[index] if index < len(self.times) else None


async def main(url: str, first: int, count: int) -> None:
    cells = [Cell() for _ in range(count)]
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        for number, cell in enumerate(cells, first):
            connection = await stack.enter_async_context(connect(url, role="cell", name=f"cell-{number}"))
            replica = Replica(connection, POLICIES)
            replica.listen(cell.applied)
            tasks.create_task(replica.run())
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await answer(cells, json.loads(line))), flush=True)
        sys.exit()  # ends the replicas, which run for ever


async def answer(cells: list[Cell], question: dict[str, Any]) -> dict[str, Any]:
    commits = {int(revision): at for revision, at in question["commits"].items()}
    async with asyncio.timeout(APPLIED_TIMEOUT):
        while any(cell.reached(max(commits)) is None for cell in cells):  # noqa: ASYNC110 (they are many)
            await asyncio.sleep(0.05)
    latencies = {
        revision: [reached - at for cell in cells if (reached := cell.reached(revision)) is not None]
        for revision, at in commits.items()
    }
    asked = {
        sample.labels["reason"]: sample.value
        for metric in RESYNCS.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    return {"latencies": latencies, "asked": asked}


if __name__ == "__main__":
    setup("bench-cells", "error")
    if sys.argv[4] == "light":
        bus.tables.replica.Follower = LightFollower  # type: ignore[misc]
        bus.tables.replica.decompress = functools.lru_cache(maxsize=4)(bus.tables.replica.decompress)
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
