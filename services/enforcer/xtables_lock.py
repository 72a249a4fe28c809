"""The lock that every legacy iptables takes for each run: a flock on a file of the machine's, not of the namespace's.

libiptc takes none, so whoever calls it must (iptables' xshared.c; kernel.md 10). The file is the one that iptables
would take: XTABLES_LOCKFILE, or /run/xtables.lock.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL = 0.002
"""Seconds between two tries."""


class Locked(Exception):
    """Somebody else has the lock, or it cannot be taken at all."""


@contextmanager
def xtables_lock(wait: float) -> Iterator[None]:
    """Hold the lock. Raises Locked if it is not free within `wait` seconds."""
    path = Path(os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock"))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Locked(f"{path}: {error.strerror}") from None
    try:
        deadline = time.monotonic() + wait
        while not _taken(descriptor):
            if time.monotonic() >= deadline:
                raise Locked(f"{path}: not free within {wait:g} s")
            time.sleep(POLL)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
