"""A raw rtnetlink socket: many requests in one system call, dumps read without decoding what nobody asks for.

pyroute2 makes and inspects the overlay device. What is done often or in bulk (container links, and three entries for
each of a thousand leases) is packed here, because building and decoding messages generically costs ten times what the
kernel needs to carry them out. The layouts are those of rtnetlink(7) and linux/rtnetlink.h; they are in host order.

Only the last message of a send asks for an acknowledgement: failures are always answered, so silence until then means
that all went well, and a thousand acknowledgements never overrun the socket's buffer.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

REQUEST, ACK, REPLACE, EXCLUSIVE, CREATE, DUMP = 0x1, 0x4, 0x100, 0x200, 0x400, 0x300
_DUMP_INTERRUPTED, _ACK_ATTRIBUTES = 0x10, 0x200
_ERROR, _DONE, _OVERRUN = 2, 3, 4
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_ERROR_TEXT = 1
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF

TIMEOUT = 10.0
SEND_BYTES = 64 << 10
RECEIVE_BYTES = 256 << 10
DUMP_ATTEMPTS = 10


class NetlinkError(OSError):
    """The kernel refused a request. The text says which, and the kernel's reason."""

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass(frozen=True, slots=True)
class Message:
    """One request: rtnetlink message type, flags beside REQUEST, payload; `what` names it in errors."""

    kind: int
    flags: int
    payload: bytes
    what: str


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    length = 4 + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in `data` by type; of a repeated one the last."""
    found = {}
    offset, end = 0, len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & _TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


class Netlink:
    """One rtnetlink socket, in the network namespace of the thread that opens it. For one thread at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(TIMEOUT)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._sequence = 0

    @property
    def port(self) -> int:
        """What names this socket in the kernel's notices of what it changed."""
        port: int = self._socket.getsockname()[0]
        return port

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, *messages: Message) -> None:
        """Carry out all messages, in order. Raises NetlinkError for the first that failed; the others are done."""
        for error in self.apply(messages).values():
            raise error

    def apply(self, messages: Sequence[Message]) -> dict[int, NetlinkError]:
        """Carry out all messages, in order, and give back the failed ones: index in `messages` -> error.

        Raises OSError when the socket itself fails; then it is not known which were carried out.
        """
        failed: dict[int, NetlinkError] = {}
        start = 0
        while start < len(messages):
            stop = _fitting(messages, start)
            first = self._sequence + 1
            self._sequence += stop - start
            data = bytearray()
            for sequence, message in enumerate(messages[start:stop], first):
                flags = REQUEST | message.flags | (ACK if sequence == self._sequence else 0)
                data += _HEADER.pack(16 + len(message.payload), message.kind, flags, sequence, 0) + message.payload
            self._socket.send(data)
            for sequence, error, text in self._answers(first, self._sequence):
                if error:
                    index = start + sequence - first
                    failed[index] = _failure(messages[index].what, error, text)
            start = stop
        return failed

    def _answers(self, first: int, until: int) -> Iterator[tuple[int, int, str]]:
        while True:
            for kind, flags, sequence, payload, _ in messages(self._socket.recv(RECEIVE_BYTES)):
                if kind == _ERROR and sequence >= first:
                    yield sequence, -struct.unpack_from("=i", payload)[0], _reason(flags, payload)
                    if sequence == until:
                        return

    def dump(self, kind: int, payload: bytes, header_size: int) -> list[tuple[bytes, dict[int, bytes]]]:
        """Every object of a kind that the kernel has: (header, attributes by type)."""
        for _ in range(DUMP_ATTEMPTS):
            found = self._dump_once(kind, payload, header_size)
            if found is not None:
                return found
        raise NetlinkError(errno.EAGAIN, f"reading the kernel's state: it changed {DUMP_ATTEMPTS} times while read")

    def _dump_once(self, kind: int, payload: bytes, header_size: int) -> list[tuple[bytes, dict[int, bytes]]] | None:
        self._sequence += 1
        self._socket.send(_HEADER.pack(16 + len(payload), kind, REQUEST | DUMP, self._sequence, 0) + payload)
        found: list[tuple[bytes, dict[int, bytes]]] = []
        whole = True
        while True:
            for answer, flags, sequence, body, _ in messages(self._socket.recv(RECEIVE_BYTES)):
                if sequence != self._sequence:
                    continue
                whole = whole and not flags & _DUMP_INTERRUPTED
                if answer == _DONE:
                    return found if whole else None
                if answer == _ERROR:
                    raise _failure("reading the kernel's state", -struct.unpack_from("=i", body)[0], "")
                found.append((body[:header_size], attributes(body[header_size:])))


def _fitting(messages: Sequence[Message], start: int) -> int:
    """Where the messages that fit into one send, beginning with `start`, end. Payloads are padded to 4 by nature."""
    size = 0
    for index in range(start, len(messages)):
        size += 16 + len(messages[index].payload)
        if size > SEND_BYTES and index > start:
            return index
    return len(messages)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes, int]]:
    """The messages in what a socket received: type, flags, sequence number, payload, port of the socket that asked."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, port = _HEADER.unpack_from(data, offset)
        if kind == _OVERRUN or length < 16:
            raise OSError(errno.ENOBUFS, "netlink: the kernel's answers overran the socket")
        yield kind, flags, sequence, data[offset + 16 : offset + length], port
        offset += (length + 3) & ~3


def _reason(flags: int, payload: bytes) -> str:
    """The kernel's own words about an error, if it has any (linux/netlink.h, NLMSGERR_ATTR_MSG)."""
    if not flags & _ACK_ATTRIBUTES:
        return ""
    # The failed request's header follows the number; its payload does not (CAP_ACK).
    text: Mapping[int, bytes] = attributes(payload[20:])
    return text.get(_ERROR_TEXT, b"").rstrip(b"\0").decode(errors="replace")


def _failure(what: str, error: int, text: str) -> NetlinkError:
    return NetlinkError(error, f"{what}: {os.strerror(error)}" + (f" ({text})" if text else ""))
