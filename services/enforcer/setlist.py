"""What an ipset holds, as the kernel lists it (IPSET_CMD_LIST, linux/netfilter/ipset/ip_set.h).

Asked once a second, so it is a message or two and not a process; and compared as bytes before anything is taken apart.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

_NETLINK_NETFILTER = 12
_LIST = 6 << 8 | 7  # NFNL_SUBSYS_IPSET, IPSET_CMD_LIST
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_PROTOCOL_VERSION = 6
_PROTOCOL, _SETNAME, _ADT = 1, 2, 8
_IP, _SKBMARK = 1, 27
_IPV4 = 1
_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.pack("=BBH", socket.AF_INET, 0, 0)
_ATTRIBUTE = struct.Struct("=HH")
TIMEOUT = 5.0


def listing(name: str) -> bytes:
    """The entries of a set, as the kernel's attributes. The same set gives the same bytes. Raises OSError: ENOENT if
    there is no such set."""
    found = bytearray()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(TIMEOUT)
        body = (
            _GENERIC + _attribute(_PROTOCOL, bytes([_PROTOCOL_VERSION])) + _attribute(_SETNAME, name.encode() + b"\0")
        )
        netlink.send(_HEADER.pack(_HEADER.size + len(body), _LIST, _REQUEST | _DUMP, 1, 0) + body)
        while True:
            data = netlink.recv(1 << 17)
            position = 0
            while position < len(data):
                length, kind, *_ = _HEADER.unpack_from(data, position)
                message = data[position + _HEADER.size : position + length]
                position += (length + 3) & ~3
                if kind in (_DONE, _ERROR):
                    code = -struct.unpack_from("=i", message)[0]
                    if code:
                        raise OSError(code, f"ipset {name}: {errno.errorcode.get(code, code)}")
                    return bytes(found)
                for attribute, value in _attributes(memoryview(message)[len(_GENERIC) :]):
                    if attribute == _ADT:
                        found += value


def members(entries: bytes) -> dict[IPv4Address, int]:
    """Address -> mark (0 without one), of what `listing` gave for a set of type hash:ip."""
    found = {}
    for _, entry in _attributes(memoryview(entries)):
        address, mark = None, 0
        for kind, value in _attributes(entry):
            if kind == _IP:
                address = next((IPv4Address(bytes(ip)) for family, ip in _attributes(value) if family == _IPV4), None)
            elif kind == _SKBMARK:
                mark = struct.unpack_from("!I", value)[0]
        if address is not None:
            found[address] = mark
    return found


def _attribute(kind: int, payload: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def _attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    position, end = 0, len(data)
    while position + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < 4:
            return
        yield kind & 0x3FFF, data[position + 4 : position + length]
        position += (length + 3) & ~3
