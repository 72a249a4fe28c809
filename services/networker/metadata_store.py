"""The original's metadata store, kept in step with this cell's container records.

What the original runs beside (iptables-logger, the drain script that waits for the last container) reads it. The
records are the truth: the store is made from them, all of it, at the start and after each change, so a crash between
record and store is mended by the next start, and an entry of a handle that we do not know goes. On a cell whose
networker this is, nobody else writes the store.

Containers are in it from `ready` until their record is gone: one that is being removed still has its address, and a
drain must wait for it. No call of a runtime waits for the store, and a store that cannot be written fails none; the
log and /readyz say so.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_never, wait_random_exponential

from bus.decode import Malformed
from bus.log import about
from bus.messages import Container, Handle, Stage
from bus.process import KernelThread
from bus.records import Records
from services.networker.store_file import Owner, StoreFile, entry

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
TRIES_BEFORE_SAYING = 5
"""A reader that has the lock for a moment is nothing to tell anybody."""


def owner(user: str | None, group: str | None) -> Owner | None:
    """Whose the store is to be, by the settings. Raises Malformed."""
    if user is None and group is None:
        return None
    if user is None or group is None:
        raise Malformed("metadata_store_owner, metadata_store_group: set both or neither")
    return Owner(user, group)


class ObservedRecords(Records):
    """Records whose every change is told to `observer`, in the thread that made it; None for one that was deleted."""

    def __init__(self, folder: Path, observer: Callable[[Handle, Container | None], None]) -> None:
        super().__init__(folder)
        self._observer = observer

    def put(self, container: Container) -> None:
        super().put(container)
        self._observer(container.handle, container)

    def delete(self, handle: Handle) -> None:
        super().delete(handle)
        self._observer(handle, None)


class MetadataStore:
    """Belongs to the event loop in which it is made."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        self._file = StoreFile(path, owner)
        # Of its own, for the store may lie on another disk than the records, which containers wait for.
        self._thread = KernelThread("metadata store")
        self._loop = asyncio.get_running_loop()
        self._entries: dict[Handle, dict[str, Any]] = {}
        self._changed = asyncio.Event()
        self._written_once = False
        self._problem: str | None = None

    def observe(self, handle: Handle, container: Container | None) -> None:
        """Note a change of a record, from whichever thread."""
        self._loop.call_soon_threadsafe(self._note, handle, container)

    def problem(self) -> str | None:
        """Why the store is not in step, if it has not been for a while."""
        return self._problem

    def load(self, containers: list[Container]) -> None:
        """The records as they are at the start."""
        for container in containers:
            self._note(container.handle, container)
        self._changed.set()

    async def run(self) -> None:
        """Write what changes, until cancelled; what changes while one write lasts is in the next, all at once."""
        while True:
            await self._changed.wait()
            # No limit on the attempts: the entries are in memory once, however long it takes.
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(OSError),
                stop=stop_never,
                wait=wait_random_exponential(FIRST_WAIT, max=LONGEST_WAIT),
                before_sleep=self._say,
            ):
                with attempt:
                    await self._write()
            if self._problem is not None:
                log.info("metadata store in step again", extra=about(file=str(self._file.path)))
            self._problem = None

    async def close(self) -> None:
        """Write what the last calls changed, if that can be done at once."""
        try:
            if self._changed.is_set():
                await self._write()
        except OSError as error:
            fields = about(file=str(self._file.path), error=str(error))
            log.warning("metadata store not written at the end; the next start does so", extra=fields)
        finally:
            self._thread.close()

    async def _write(self) -> None:
        self._changed.clear()
        try:
            # The first time in any case: a crash may have cut a write short, after the data and before the version.
            await self._thread.run(self._file.keep, dict(self._entries), anew=not self._written_once)
        except BaseException:
            self._changed.set()
            raise
        self._written_once = True

    def _note(self, handle: Handle, container: Container | None) -> None:
        if container is not None and container.address is not None and container.stage is not Stage.ATTACHING:
            new = entry(container)
            if self._entries.get(handle) == new:
                return
            self._entries[handle] = new
        elif self._entries.pop(handle, None) is None:
            return
        self._changed.set()

    def _say(self, state: RetryCallState) -> None:
        if state.attempt_number < TRIES_BEFORE_SAYING:
            return
        error = state.outcome.exception() if state.outcome else None
        reason = "another process keeps its lock" if isinstance(error, BlockingIOError) else str(error)
        self._problem = f"{self._file.path} is not in step with the containers: {reason}"
        log.warning(
            "metadata store not written, trying again; containers do not need it",
            extra=about(file=str(self._file.path), error=reason, attempt=state.attempt_number),
        )
