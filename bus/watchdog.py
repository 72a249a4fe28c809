"""What systemd is told of a service: that it is ready, that it still runs, that it stops (sd_notify(3)).

The sign of life is given by the event loop itself, so a loop that hangs gives none, and systemd restarts the service
(`WatchdogSec=`, systemd.service(5)). One message is one datagram to the socket that `NOTIFY_SOCKET` names; without that
variable all of this does nothing. Nothing waits here: a message that cannot be delivered is dropped and said, since a
service must not depend on who watches it.
"""

import asyncio
import logging
import os
import socket

from bus.log import about

log = logging.getLogger(__name__)

SIGNS_PER_PERIOD = 3
"""systemd asks for two; one more, so that a busy machine that delays one is not taken for a hang."""


def ready() -> None:
    """The doors are open: what must start after this service may start. Its `/readyz` says whether all is well."""
    _tell("READY=1")


def stopping() -> None:
    _tell("STOPPING=1")


async def feed() -> None:
    """Give signs of life for ever; returns at once where nobody asks for them."""
    period = watched_period()
    while period is not None:
        _tell("WATCHDOG=1")
        await asyncio.sleep(period / SIGNS_PER_PERIOD)


def watched_period() -> float | None:
    """Seconds within which systemd wants a sign of life of this very process (sd_watchdog_enabled(3)), or None."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # inherited from the service that started us, and asked of it
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


def _tell(message: str) -> None:
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    # "@" stands for the NUL byte that an abstract socket's name begins with (unix(7)).
    address = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as messenger:
            messenger.sendto(message.encode(), address)
    except OSError as error:
        log.warning("systemd could not be told", extra=about(message=message, socket=where, error=str(error)))
