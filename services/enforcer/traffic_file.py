"""The traffic log's file: lines are queued in the event loop and written by a thread of their own.

Not in the kernel thread: a disk that hangs must not hold up rules. The queue is bounded; what does not fit is dropped
and counted. A file that was renamed or removed (logrotate) is opened anew, as the original's logger does.
"""

import asyncio
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from prometheus_client import Counter

from bus.log import about
from bus.process import KernelThread

log = logging.getLogger(__name__)

MAX_QUEUED = 10_000
"""Lines, of some 800 bytes: 8 MB."""
FLUSH_SECONDS = 0.2
SAY_SECONDS = 60.0

LOST = Counter(
    "silkbus_enforcer_traffic_lost_total",
    "Packets handed over by rules, lines or events that were dropped, by where",
    ["where"],
)


class TrafficFile:
    """`put` lines from the event loop; `run` it in a task."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._lines: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._said = -SAY_SECONDS

    @property
    def full(self) -> bool:
        return len(self._lines) >= MAX_QUEUED

    def put(self, line: bytes) -> None:
        """Queue a line, or drop it when there are too many."""
        if self.full:
            LOST.labels("file").inc()
            return
        self._lines.append(line)
        self._wake.set()

    async def run(self) -> None:
        """Write for ever; on cancellation, what is queued is still written."""
        thread = KernelThread("traffic-log")
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await thread.run(self._write, self._take())
                await asyncio.sleep(FLUSH_SECONDS)
        finally:
            # Straight away: no task may wait any more.
            thread.close()
            self._write(self._take())
            self._close()

    def _take(self) -> list[bytes]:
        lines = list(self._lines)
        self._lines.clear()
        return lines

    def _write(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        try:
            file = self._opened()
            file.write(b"".join(lines))
            file.flush()
        except OSError as error:
            self._close()
            LOST.labels("file").inc(len(lines))
            if time.monotonic() - self._said > SAY_SECONDS:
                self._said = time.monotonic()
                log.warning(
                    "traffic log not written; free some space, or set traffic_log to another file",
                    extra=about(file=str(self._path), error=str(error), lines=len(lines)),
                )

    def _opened(self) -> IO[bytes]:
        if self._path is None:
            return sys.stdout.buffer
        if self._file is not None and not _is(self._file, self._path):
            self._close()
        if self._file is None:
            self._file = self._path.open("ab")
        return self._file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # what it still held is lost, and was counted or will be read as cut short
                log.debug("traffic log not closed", extra=about(file=str(self._path), error=str(error)))


def _is(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(file.fileno())
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
