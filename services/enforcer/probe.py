"""Really tries a connection from inside a container's network namespace, to say what no look at rules can.

Each container's tries are made in a thread of their own that enters the namespace and ends with it. A TCP connection
is opened and closed; of UDP one empty datagram is sent, which says little: only that nobody refused it at once.
"""

import asyncio
import errno
import os
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
    """What came of it, in the order of the targets. Never raises; takes little more than LIMIT."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Probe, ...]] = loop.create_future()

    def finish(result: tuple[Probe, ...]) -> None:
        if not done.done():
            done.set_result(result)

    def work() -> None:
        result = _from_inside(container.netns, protocol, port, targets)
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result)

    # Not a thread of a pool: nothing else may run in one that has entered another namespace.
    threading.Thread(target=work, name="probe", daemon=True).start()
    return await done


def _from_inside(path: str, protocol: Protocol, port: int, targets: Sequence[IPv4Address]) -> tuple[Probe, ...]:
    try:
        netns.setns(path)
    except OSError as error:
        words = f"the container's network namespace {path} cannot be entered: {error.strerror}"
        return tuple(Probe(target, Outcome.FAILED, 0.0, words) for target in targets)
    kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
    results: dict[IPv4Address, Probe] = {}
    threads = [
        threading.Thread(target=lambda at=target: results.__setitem__(at, _try(kind, at, port)), daemon=True)
        for target in dict.fromkeys(targets)
    ]
    for thread in threads:
        thread.start()  # a thread begins in the namespace of the one that starts it
    for thread in threads:
        thread.join(LIMIT + 1.0)
    return tuple(results.get(target, Probe(target, Outcome.TIMEOUT, LIMIT * 1000)) for target in targets)


def _try(kind: socket.SocketKind, address: IPv4Address, port: int) -> Probe:
    began = time.monotonic()

    def said(outcome: Outcome, error: str = "") -> Probe:
        return Probe(address, outcome, round((time.monotonic() - began) * 1000, 1), error)

    try:
        with socket.socket(socket.AF_INET, kind) as made:
            made.settimeout(LIMIT if kind == socket.SOCK_STREAM else _UDP_WAIT)
            made.connect((str(address), port))
            if kind == socket.SOCK_STREAM:
                return said(Outcome.CONNECTED)
            made.send(b"")
            with suppress(TimeoutError):
                made.recv(1)
            return said(Outcome.SENT)
    except TimeoutError:
        return said(Outcome.TIMEOUT)
    except ConnectionRefusedError as error:
        return said(Outcome.REFUSED, error.strerror or "")
    except OSError as error:
        text = error.strerror or os.strerror(error.errno or 0)
        return said(Outcome.UNREACHABLE if error.errno in _UNREACHABLE else Outcome.FAILED, text)
