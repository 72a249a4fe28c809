"""Turns: calls for one container run one after the other, in the order in which they came."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from bus.messages import Handle
from services.networker.errors import Unavailable


class Turns:
    """A lock for each handle, there only while somebody holds it or waits for it."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._locks: WeakValueDictionary[Handle, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, handle: Handle) -> AsyncIterator[None]:
        """Wait for the turn and hold it while inside. Raises Unavailable after `timeout` seconds of waiting."""
        lock = self._locks.setdefault(handle, asyncio.Lock())
        try:
            async with asyncio.timeout(self._timeout):
                await lock.acquire()
        except TimeoutError:
            raise Unavailable(f"another call for container {handle} is still at work: try again") from None
        try:
            yield
        finally:
            lock.release()
