"""Really tries a connection from inside a container's network namespace, to say what no look at rules can.

Each container's tries are made in a thread of their own that enters the namespace and ends with it. A TCP connection
is opened and closed; of UDP one empty datagram is sent, which says little: only that nobody refused it at once.
"""

import asyncio
import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address

from pyroute2 import netns

from bus.explaining import Outcome, Probe
from bus.messages import Container, Protocol

LIMIT = 2.0
"""Seconds for all tries from one container, which are made at the same time."""
MAX_CONTAINERS = 10
"""Containers of a cell that try."""
_UDP_WAIT = 0.3
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EPERM)


async def probe(
    container: Container, protocol: Protocol, port: int, targets: Sequence[IPv4Address]
) -> tuple[Probe, ...]:
    """What came of it, in the order of the targets; takes little more than LIMIT."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Probe, ...]] = loop.create_future()

    def finish(result: tuple[Probe, ...]) -> None:
        if not done.done():
            done.set_result(result)

    def work() -> None:
        try:
            result = _from_inside(container.netns, protocol, port, targets)
        except OSError as error:  # no more files, say
            result = tuple(Probe(target, Outcome.FAILED, 0.0, str(error)) for target in targets)
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result)

    # Not a thread of a pool: nothing else may run in one that has entered another namespace.
    threading.Thread(target=work, name="probe", daemon=True).start()
    return await done


def _from_inside(path: str, protocol: Protocol, port: int, targets: Sequence[IPv4Address]) -> tuple[Probe, ...]:
    try:
        # Given a path, pyroute2 makes a namespace where there is none.
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            netns.setns(namespace)
        finally:
            os.close(namespace)
    except OSError as error:
        words = f"the container's network namespace {path} cannot be entered: {error.strerror}"
        return tuple(Probe(target, Outcome.FAILED, 0.0, words) for target in targets)
    tries = {target: _Try(protocol, target, port) for target in dict.fromkeys(targets)}
    with selectors.DefaultSelector() as waiting:
        for each in tries.values():
            each.begin(waiting)
        deadline = time.monotonic() + (LIMIT if protocol is Protocol.TCP else _UDP_WAIT)
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                waiting.unregister(key.fileobj)
                key.data.end()
    return tuple(tries[target].close() for target in targets)


class _Try:
    """One connection that is being tried."""

    def __init__(self, protocol: Protocol, address: IPv4Address, port: int) -> None:
        self._stream = protocol is Protocol.TCP
        self._to = (str(address), port)
        self._address = address
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM if self._stream else socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._began = time.monotonic()
        self._said: Probe | None = None

    def begin(self, waiting: selectors.BaseSelector) -> None:
        number = self._socket.connect_ex(self._to)
        if number == 0 and not self._stream:
            with suppress(OSError):  # what comes of it is asked for when the time has come
                self._socket.send(b"")
            waiting.register(self._socket, selectors.EVENT_READ, self)
        elif number in (0, errno.EINPROGRESS):
            waiting.register(self._socket, selectors.EVENT_WRITE, self)
        else:
            self._say(number)

    def end(self) -> None:
        """Something has come of it."""
        self._say(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def close(self) -> Probe:
        """What is known when the time is up. May be called again."""
        self._socket.close()
        if self._said is None:
            self._note(Outcome.TIMEOUT if self._stream else Outcome.SENT, "")
        assert self._said is not None  # noqa: S101 (noted above)
        return self._said

    def _say(self, number: int) -> None:
        if number == 0:
            self._note(Outcome.CONNECTED if self._stream else Outcome.SENT, "")
        elif number == errno.ECONNREFUSED:
            self._note(Outcome.REFUSED, os.strerror(number))
        elif number == errno.ETIMEDOUT:
            self._note(Outcome.TIMEOUT, "")
        else:
            self._note(Outcome.UNREACHABLE if number in _UNREACHABLE else Outcome.FAILED, os.strerror(number))

    def _note(self, outcome: Outcome, error: str) -> None:
        self._said = Probe(self._address, outcome, round((time.monotonic() - self._began) * 1000, 1), error)
