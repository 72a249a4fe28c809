"""Packets that rules hand to user space: a reader of one NFLOG group (linux/netfilter/nfnetlink_log.h).

Read with struct, like `conntrack` and for the same reason: it keeps up with 79 000 packets a second, where a general
netlink library takes apart 20 000 (kernel.md 7 has the figures). The kernel numbers what it sends, so what it had to
drop because nobody read in time is counted exactly.
"""

import errno
import logging
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

log = logging.getLogger(__name__)

_NETLINK_NETFILTER = 12
_ULOG = 4 << 8  # NFNL_SUBSYS_ULOG
_PACKET, _CONFIG = _ULOG | 0, _ULOG | 1
_REQUEST, _ACK = 0x1, 0x4
_ERROR = 2
_CFG_CMD, _CFG_MODE, _CFG_TIMEOUT, _CFG_FLAGS = 1, 2, 4, 6
_BIND = 1
_COPY_PACKET = 2
_SEQUENCE = 1
_MARK, _PAYLOAD, _PREFIX, _SEQ = 2, 9, 10, 12
_SO_RCVBUFFORCE = 33

COPIED = 60 + 8
"""Bytes of each packet that are copied: the longest IPv4 header, and the ports or type and code after it."""
GATHERED = 10
"""Hundredths of a second for which the kernel may gather packets before it hands them over."""
BUFFER = 2 << 20
TIMEOUT = 5.0
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_PORTS = struct.Struct("!HH")
_GENERIC = 4
_TCP, _UDP, _ICMP = 6, 17, 1


class GroupTaken(Exception):
    """Another process reads this NFLOG group. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One packet, as the rule that logged it saw it. Ports are 0 where there are none, as are ICMP's type and code."""

    prefix: str
    mark: int
    source: IPv4Address
    destination: IPv4Address
    protocol: int
    source_port: int = 0
    port: int = 0
    icmp_type: int = 0
    icmp_code: int = 0


class NflogSocket:
    """The packets of one group in the network namespace of the thread that makes this; read it from any."""

    def __init__(self, group: int) -> None:
        """Raises GroupTaken, or OSError where the kernel has no NFLOG."""
        self.lost = 0
        self._next: int | None = None
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
            except PermissionError:  # root of a user namespace only
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self._socket.settimeout(TIMEOUT)
            try:
                self._configure(group, _CFG_CMD, struct.pack("=B", _BIND))
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.EPERM):
                    raise GroupTaken(
                        f"NFLOG group {group}: another process reads it, or we are not root; end that process,"
                        " or set nflog_group to another number"
                    ) from error
                raise
            self._configure(group, _CFG_MODE, struct.pack("!IBB", COPIED, _COPY_PACKET, 0))
            self._configure(group, _CFG_TIMEOUT, struct.pack("!I", GATHERED))
            self._configure(group, _CFG_FLAGS, struct.pack("!H", _SEQUENCE))
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self, most: int) -> list[Logged]:
        """What is there now, about `most` packets; none when there is nothing. Never waits. Raises OSError."""
        packets: list[Logged] = []
        while len(packets) < most:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                # The buffer ran over. The numbers of those that follow say by how many.
                if error.errno == errno.ENOBUFS:
                    continue
                raise
            packets += self._packets(data)
        return packets

    def _packets(self, data: bytes) -> Iterator[Logged]:
        position = 0
        while position + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, position)
            if length < _HEADER.size:
                return
            if kind == _PACKET:
                attributes = _attributes(data, position + _HEADER.size + _GENERIC, position + length)
                self._count(attributes.get(_SEQ))
                packet = _logged(attributes)
                if packet is not None:
                    yield packet
            position += (length + 3) & ~3

    def _count(self, sequence: bytes | None) -> None:
        if sequence is None or len(sequence) != 4:
            return
        number = int.from_bytes(sequence, "big")
        if self._next is not None:
            self.lost += (number - self._next) & 0xFFFFFFFF
        self._next = (number + 1) & 0xFFFFFFFF

    def _configure(self, group: int, kind: int, payload: bytes) -> None:
        body = struct.pack("!BBH", socket.AF_UNSPEC, 0, group)
        body += _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), _CONFIG, _REQUEST | _ACK, 1, 0) + body)
        while True:
            data = self._socket.recv(1 << 16)
            _, message, _, _, _ = _HEADER.unpack_from(data)
            if message != _ERROR:
                continue  # a packet of the group, which is bound already
            code = -struct.unpack_from("=i", data, _HEADER.size)[0]
            if code:
                raise OSError(code, f"NFLOG group {group}: {errno.errorcode.get(code, code)}")
            return


def _attributes(data: bytes, position: int, end: int) -> dict[int, bytes]:
    found = {}
    while position + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x7FFF] = data[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3
    return found


def _logged(attributes: dict[int, bytes]) -> Logged | None:
    """The packet that a message is about; None for what is not IPv4."""
    payload = attributes.get(_PAYLOAD, b"")
    if len(payload) < 20 or payload[0] >> 4 != 4:
        return None
    prefix = attributes.get(_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace")
    mark = int.from_bytes(attributes.get(_MARK, b""), "big")
    source, destination = IPv4Address(payload[12:16]), IPv4Address(payload[16:20])
    protocol = payload[9]
    begin = 4 * (payload[0] & 0xF)
    later_fragment = int.from_bytes(payload[6:8], "big") & 0x1FFF
    if later_fragment or len(payload) < begin + 4:
        return Logged(prefix, mark, source, destination, protocol)
    if protocol in (_TCP, _UDP):
        return Logged(prefix, mark, source, destination, protocol, *_PORTS.unpack_from(payload, begin))
    if protocol == _ICMP:
        return Logged(
            prefix, mark, source, destination, protocol, icmp_type=payload[begin], icmp_code=payload[begin + 1]
        )
    return Logged(prefix, mark, source, destination, protocol)
