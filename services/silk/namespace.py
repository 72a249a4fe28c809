"""Entering another network namespace, in a thread that lives no longer than the work done there.

A thread that could not come back would do the rest of its life's work in a container; a thread that ends cannot.
Opening sockets and writing under /proc/sys/net there concern that namespace, as in a process started in it.
"""

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

R = TypeVar("R")
_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
_SO_NETNS_COOKIE = 71  # linux/asm-generic/socket.h, Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(Exception):
    """A network namespace that is not there, or is none."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace: the path it was opened by, and a descriptor of it."""

    path: str
    descriptor: int

    @property
    def is_own(self) -> bool:
        """Whether it is the calling thread's."""
        here, own = os.fstat(self.descriptor), os.stat("/proc/thread-self/ns/net")  # noqa: PTH116 (no path is needed)
        return (here.st_dev, here.st_ino) == (own.st_dev, own.st_ino)

    def run(self, work: Callable[[], R]) -> R:
        """Do `work` in this namespace and give back its result. Its errors are raised here."""
        visit = _Visit(self, work)
        visit.start()
        visit.join()
        if visit.error is not None:
            raise visit.error
        return visit.result


@contextmanager
def opened(path: str) -> Iterator[Namespace]:
    """The network namespace at `path`, for as long as the block lasts. Raises NamespaceError."""
    try:
        # Not to be held up by whatever the path leads to, a FIFO say.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise NamespaceError(f"network namespace {path!r} cannot be opened: {error}") from None
    try:
        if not _is_network_namespace(descriptor):
            raise NamespaceError(f"{path!r} is not a network namespace")
        yield Namespace(path, descriptor)
    finally:
        os.close(descriptor)


def _is_network_namespace(descriptor: int) -> bool:
    try:
        return fcntl.ioctl(descriptor, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


class _Visit(threading.Thread, Generic[R]):
    def __init__(self, namespace: Namespace, work: Callable[[], R]) -> None:
        super().__init__(name="namespace", daemon=True)
        self._namespace = namespace
        self._work = work
        self.result: R
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            # setns(2) moves only the calling thread.
            if _libc.setns(self._namespace.descriptor, _CLONE_NEWNET) != 0:
                reason = os.strerror(ctypes.get_errno())
                raise NamespaceError(f"{self._namespace.path!r} cannot be entered as a network namespace: {reason}")
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 (raised again where the work was asked for)
            self.error = error


def namespace_number() -> int:
    """The kernel's number of the calling thread's network namespace, never given twice; 0 if it gives none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            number: int = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
        except OSError:
            return 0
        return number


def write_sysctl(name: str, value: str) -> bool:
    """Write net.NAME of the calling thread's network namespace; whether it was not so. Raises OSError."""
    path = Path("/proc/sys/net") / name
    if path.read_text().strip() == value:
        return False
    path.write_text(value)
    return True
