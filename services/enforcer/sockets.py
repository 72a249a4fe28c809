"""Ends the TCP connections of a flow that is being cut, in the containers that hold them.

Rules that refuse a flow tell whoever sends; a peer that only waits would wait for ever. So its socket is destroyed, by
sock_diag in the container's own network namespace (sock_diag(7), linux/inet_diag.h): the application gets ECONNABORTED,
and the kernel sends the far end a reset, also to another cell. That must pass, so it comes before the flow is marked.

What the kernel finds for a connection that is gone is the listening socket, which must live; so a socket is asked for
first, and destroyed by its cookie.
"""

import ctypes
import logging
import os
import socket
import struct
import threading
from collections.abc import Mapping
from ipaddress import IPv4Address
from types import TracebackType

from bus.log import about

log = logging.getLogger(__name__)

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_REQUEST, _ACK = 0x1, 0x4
_ERROR = 2
_LISTEN = 10
_HEADER = struct.Struct("=IHHII")
_REQUEST_START = struct.Struct("=BBBxI")
_SOCKET_ID = struct.Struct("!HH4s12x4s12x")
"""struct inet_diag_sockid up to the interface: ports and addresses, in network byte order."""
_NO_COOKIE = b"\xff" * 8
_COOKIE_AT = 4 + _SOCKET_ID.size + 4
_CLONE_NEWNET = 0x40000000
TIMEOUT = 1.0

_libc = ctypes.CDLL(None, use_errno=True)

End = tuple[IPv4Address, int]


class Sockets:
    """The containers' sockets, for the time of one look at the flows: holding them longer would keep namespaces alive.

    `namespaces` says where the namespace of an address is, for the containers of this cell.
    """

    def __init__(self, namespaces: Mapping[IPv4Address, str]) -> None:
        self._namespaces = namespaces
        self._open: dict[IPv4Address, socket.socket | None] = {}

    def __enter__(self) -> "Sockets":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for diag in self._open.values():
            if diag is not None:
                diag.close()

    def end(self, one: End, other: End) -> int:
        """Destroy the TCP sockets of the connection between two ends that containers here hold; how many there were."""
        return self._destroy(one, other) + self._destroy(other, one)

    def _destroy(self, local: End, remote: End) -> int:
        diag = self._diag(local[0])
        if diag is None:
            return 0
        identity = _SOCKET_ID.pack(local[1], remote[1], local[0].packed, remote[0].packed) + struct.pack("=I", 0)
        try:
            found = _ask(diag, _BY_FAMILY, _REQUEST, identity + _NO_COOKIE)
            if found is None or found[1] == _LISTEN:
                return 0
            cookie = found[_COOKIE_AT : _COOKIE_AT + 8]
            return int(_ask(diag, _DESTROY, _REQUEST | _ACK, identity + cookie) is not None)
        except OSError as error:
            log.warning("socket not destroyed", extra=about(address=str(local[0]), error=str(error)))
            return 0

    def _diag(self, address: IPv4Address) -> socket.socket | None:
        if address not in self._open:
            path = self._namespaces.get(address)
            self._open[address] = None if path is None else _diag_in(path)
        return self._open[address]


def _ask(diag: socket.socket, kind: int, flags: int, identity: bytes) -> bytes | None:
    """The answer to one question, or None if there is no such socket (any more)."""
    body = _REQUEST_START.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + identity
    diag.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body)
    answer = diag.recv(1 << 16)
    message = answer[_HEADER.size :]
    if _HEADER.unpack_from(answer)[1] != _ERROR:
        return message
    code = -struct.unpack_from("=i", message)[0]
    if code == 0:
        return message
    # ENOENT: gone; ESTALE: another one by now.
    if code in (2, 116):
        return None
    raise OSError(code, os.strerror(code))


def _diag_in(path: str) -> socket.socket | None:
    """A socket that asks in another network namespace, where it stays; made in a thread that enters there and ends."""
    made: list[socket.socket] = []
    problem: list[OSError] = []

    def enter() -> None:
        try:
            namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(namespace, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            finally:
                os.close(namespace)
            diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
            diag.settimeout(TIMEOUT)
            made.append(diag)
        except OSError as error:
            problem.append(error)

    thread = threading.Thread(target=enter, name="namespace", daemon=True)
    thread.start()
    thread.join()
    if problem:
        log.info("sockets not reached", extra=about(netns=path, error=str(problem[0])))
    return made[0] if made else None
