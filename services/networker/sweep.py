"""Taking apart what a crash, or a service that was down, left half done.

At a start: records that say `attaching` (nobody was answered) or `removing`, ready ones whose namespace is gone (the
cell was rebooted, or the runtime died), and those being changed. Later: attachments whose undoing or removal failed. A
service that is down is no reason to forget one, so this tries until it succeeds, slower and slower; containers being
attached and removed go on meanwhile.
"""

import asyncio
import logging

from prometheus_client import Gauge
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_never, wait_exponential_jitter

from bus.log import about
from bus.messages import Handle
from bus.process import KernelThread
from services.networker.attachments import Attachments
from services.networker.found import needs_settling

log = logging.getLogger(__name__)

LEFTOVERS = Gauge("silkbus_networker_leftovers", "Containers half attached or half removed, to be taken apart")
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0


class _Unfinished(Exception):
    """Some leftovers could not be taken apart yet."""


class Sweep:
    """The leftovers of one networker, taken apart in the background."""

    def __init__(self, attachments: Attachments, disk: KernelThread) -> None:
        self._attachments = attachments
        self._disk = disk
        self._pending: set[Handle] = set()
        self._more = asyncio.Event()
        attachments.leftover = self._add

    def _add(self, handle: Handle) -> None:
        self._pending.add(handle)
        LEFTOVERS.set(len(self._pending))
        self._more.set()

    async def run(self) -> None:
        """Find what the last run left, then take apart what comes, until cancelled."""
        for record in await self._attachments.all():
            if await self._disk.run(needs_settling, record):
                self._add(record.handle)
        while True:
            await self._more.wait()
            # No limit on the attempts: giving up would leak an address and a link until the next start.
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(_Unfinished),
                stop=stop_never,
                wait=wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT),
                before_sleep=self._log,
            ):
                with attempt:
                    await self._pass()

    async def _pass(self) -> None:
        self._more.clear()
        for handle in sorted(self._pending):
            try:
                if await self._attachments.settle(handle):
                    log.info("settled a leftover", extra=about(handle=handle))
            except Exception as error:  # noqa: BLE001 (one that fails must not keep the others)
                log.warning("leftover remains for now", extra=about(handle=handle, error=repr(error)))
            else:
                self._pending.discard(handle)
        LEFTOVERS.set(len(self._pending))
        if self._pending:
            raise _Unfinished

    def _log(self, state: RetryCallState) -> None:
        wait = state.next_action.sleep if state.next_action else 0
        fields = about(leftovers=len(self._pending), attempt=state.attempt_number, wait=round(wait, 1))
        log.info("leftovers are tried again", extra=fields)
