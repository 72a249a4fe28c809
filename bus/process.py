"""The frame of a service process: one event loop that decides, one thread that blocks, an orderly end."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from bus import watchdog

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class KernelThread:
    """The one thread in which a service does all its blocking work (netlink, subprocesses, files), in order."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `work` after everything given earlier. If the caller is cancelled, work that has begun still finishes."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def check_cancelled() -> None:
    """Raise CancelledError if this task is to end.

    Python 3.11's asyncio.wait_for, with which nats-py waits, forgets a cancellation that comes at the very moment when
    the answer does, and nats-py forgets some itself; a task that goes on for ever then never ends (measured: one time
    in forty). The task itself still knows, so one that calls nats-py in a loop looks after each call.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@contextlib.contextmanager
def cancellation_heeded() -> Iterator[None]:
    """Around calls of nats-py: a cancellation that they forgot is raised on leaving, whether they failed or not."""
    try:
        yield
    finally:
        check_cancelled()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `main` until it ends or SIGTERM or SIGINT comes, which cancels it. Errors propagate.

    Meanwhile systemd gets its signs of life; that it is ready, `main` says (bus.watchdog).
    """

    async def until_signal() -> None:
        task = asyncio.ensure_future(main())
        loop = asyncio.get_running_loop()
        feeding = asyncio.create_task(watchdog.feed())

        def end() -> None:
            watchdog.stopping()
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        finally:
            feeding.cancel()
        log.info("stopped")

    asyncio.run(until_signal())
