"""The kernel's connection table, as far as the enforcer needs it: find flows, mark them, delete them.

Messages are built and read here with struct (ctnetlink, linux/netfilter/nfnetlink_conntrack.h): a general netlink
library needs 0.46 ms for each entry it decodes, which for the 20 000 of a busy cell is 9 s; this needs some
microseconds. Entries are named to the kernel by the bytes of their own tuple, as they came.
"""

import errno
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from services.enforcer.rules import TAG_MASK

_NETLINK_NETFILTER = 12
_CTNETLINK = 1 << 8
_NEW, _GET, _DELETE, _GET_STATS = _CTNETLINK | 0, _CTNETLINK | 1, _CTNETLINK | 2, _CTNETLINK | 5
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY, _MARK, _ZONE, _MARK_MASK, _FILTER = 1, 2, 8, 18, 21, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SRC, _V4_DST = 1, 2
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_REPLY_FLAGS = 2
_FLAG_SRC = 1
_PROTOCOLS = {6: "tcp", 17: "udp"}

TIMEOUT = 10.0
_BUFFER = 1 << 20
_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.pack("=BBH", socket.AF_INET, 0, 0)
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Flow:
    """One entry: who opened it to whom, what is in its mark, and the attributes that name it to the kernel."""

    source: IPv4Address
    destination: IPv4Address
    """Who answers: where the destination was translated (a forwarded port), what it was translated to; so is `port`."""
    protocol: str
    """tcp, udp, or the protocol's number."""
    source_port: int
    port: int
    """The destination's; both 0 for protocols without."""
    mark: int
    name: bytes


class Conntrack:
    """The connection table of the network namespace in which this was made. For one thread."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.settimeout(TIMEOUT)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def count(self) -> int:
        """How many entries there are. Microseconds."""
        self._send(_GET_STATS, _REQUEST, b"")
        answer = memoryview(self._socket.recv(1 << 16))
        message = answer[_HEADER.size :]
        if _HEADER.unpack_from(answer)[1] == _ERROR:
            _raise(message)
        # The only attribute is CTA_STATS_GLOBAL_ENTRIES.
        return int(struct.unpack_from("!I", message, len(_GENERIC) + _ATTRIBUTE.size)[0])

    def all(self) -> Iterator[Flow]:
        """Every IPv4 entry."""
        return self._dump(b"")

    def flows(self, tag: int | None = None) -> Iterator[Flow]:
        """IPv4 entries with this tag in the low 16 bits of the mark, or with any."""
        return self._dump(b"" if tag is None else _tagged(tag), tagged=True)

    def marked(self, bits: int) -> Iterator[Flow]:
        """IPv4 entries that have all these bits in their mark."""
        return self._dump(_marked(bits, bits))

    def flows_to(self, address: IPv4Address, tag: int | None = None) -> Iterator[Flow]:
        """Entries opened to this address, with this tag in the low 16 bits of the mark."""
        marked = b"" if tag is None else _tagged(tag)
        found = self._dump(_tuple(_TUPLE_REPLY, _V4_SRC, address) + marked + _filter(_REPLY_FLAGS, _FLAG_SRC))
        # A kernel older than 5.8 does not filter, so what it gives is looked at again.
        return (f for f in found if f.destination == address and (tag is None or f.mark & TAG_MASK == tag))

    def mark(self, flow: Flow, value: int, mask: int) -> bool:
        """Set these bits of the flow's mark; False if it is gone."""
        return self._change(_NEW, flow.name + _marked(value, mask))

    def delete(self, flow: Flow) -> bool:
        """Delete an entry; False if it is gone already."""
        return self._change(_DELETE, flow.name)

    def forget(self, addresses: Collection[IPv4Address]) -> int:
        """Delete every entry from or to one of these addresses; how many there were.

        One dump of everything, since each walks the whole table (9 ms, empty or not), and a filter has one field only.
        """
        found = list(self._dump(b"", naming=[address.packed for address in addresses]))
        concerned = [f for f in found if not {f.source, f.destination}.isdisjoint(addresses)]
        return sum(self.delete(flow) for flow in concerned)

    def _dump(self, body: bytes, *, tagged: bool = False, naming: Collection[bytes] = ()) -> Iterator[Flow]:
        """Entries as filtered by `body`; only those with a tag if `tagged`; only those that hold one of `naming`."""
        sequence = self._send(_GET, _REQUEST | _DUMP, body)
        while True:
            data = self._socket.recv(1 << 18)
            view = memoryview(data)
            position = 0
            while position < len(data):
                length, kind, _, number, _ = _HEADER.unpack_from(data, position)
                start, end = position + _HEADER.size, position + length
                position += (length + 3) & ~3
                if number != sequence:
                    continue
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    _raise(view[start:end])
                # Looked for before anything is taken apart, which costs twenty times as much.
                if naming and all(data.find(name, start, end) < 0 for name in naming):
                    continue
                flow = _flow(view[start:end], tagged=tagged)
                if flow is not None:
                    yield flow

    def _change(self, kind: int, body: bytes) -> bool:
        sequence = self._send(kind, _REQUEST | _ACK, body)
        while True:
            data = memoryview(self._socket.recv(1 << 16))
            _, kind, _, number, _ = _HEADER.unpack_from(data)
            if number == sequence and kind == _ERROR:
                try:
                    _raise(data[_HEADER.size :])
                except FileNotFoundError:
                    return False
                return True

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        self._sequence += 1
        length = _HEADER.size + len(_GENERIC) + len(body)
        self._socket.send(_HEADER.pack(length, kind, flags, self._sequence, 0) + _GENERIC + body)
        return self._sequence


def _raise(message: memoryview) -> None:
    code = -struct.unpack_from("=i", message)[0]
    if code:
        raise OSError(code, f"conntrack: {errno.errorcode.get(code, code)}")


def _attribute(kind: int, payload: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def _tuple(which: int, side: int, address: IPv4Address) -> bytes:
    return _attribute(which | _NESTED, _attribute(_TUPLE_IP | _NESTED, _attribute(side, address.packed)))


def _tagged(tag: int) -> bytes:
    return _marked(tag, TAG_MASK)


def _marked(value: int, mask: int) -> bytes:
    return _attribute(_MARK, struct.pack("!I", value)) + _attribute(_MARK_MASK, struct.pack("!I", mask))


def _filter(which: int, flag: int) -> bytes:
    return _attribute(_FILTER | _NESTED, _attribute(which, struct.pack("=I", flag)))


def _attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    position, end = 0, len(data)
    while position + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < 4:
            return
        yield kind & 0x3FFF, data[position + 4 : position + length]
        position += (length + 3) & ~3


def _flow(message: memoryview, *, tagged: bool) -> Flow | None:
    """An entry as the kernel dumps it; None for what is not an IPv4 flow, or has no tag if it must be `tagged`."""
    attributes = dict(_attributes(message[len(_GENERIC) :]))
    mark = int.from_bytes(attributes.get(_MARK, b""), "big")
    if (tagged and mark & TAG_MASK == 0) or _TUPLE_ORIG not in attributes or _TUPLE_REPLY not in attributes:
        return None
    original, answer = _read_tuple(attributes[_TUPLE_ORIG]), _read_tuple(attributes[_TUPLE_REPLY])
    if original is None or answer is None:
        return None
    source, _, protocol, source_port, _ = original
    destination, _, _, port, _ = answer
    name = _attribute(_TUPLE_ORIG | _NESTED, bytes(attributes[_TUPLE_ORIG]))
    if _ZONE in attributes:
        name += _attribute(_ZONE, bytes(attributes[_ZONE]))
    return Flow(source, destination, _PROTOCOLS.get(protocol, str(protocol)), source_port, port, mark, name)


def _read_tuple(data: memoryview) -> tuple[IPv4Address, IPv4Address, int, int, int] | None:
    source = destination = None
    protocol = source_port = port = 0
    for kind, nested in _attributes(data):
        for part, value in _attributes(nested):
            if kind == _TUPLE_IP and part == _V4_SRC:
                source = IPv4Address(bytes(value))
            elif kind == _TUPLE_IP and part == _V4_DST:
                destination = IPv4Address(bytes(value))
            elif kind == _TUPLE_PROTO and part == _PROTO_NUM:
                protocol = value[0]
            elif kind == _TUPLE_PROTO and part == _PROTO_SRC_PORT:
                source_port = struct.unpack("!H", value)[0]
            elif kind == _TUPLE_PROTO and part == _PROTO_DST_PORT:
                port = struct.unpack("!H", value)[0]
    return None if source is None or destination is None else (source, destination, protocol, source_port, port)
