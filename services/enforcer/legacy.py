"""What the kernel says of a legacy (xtables) table without any program: how many entries it has, and a digest of them.

An xtables table has no generation number, and reading it with iptables-save costs a process and a line of text for each
rule. These are the two questions that iptables itself begins with (getsockopt of IPT_SO_GET_INFO and
IPT_SO_GET_ENTRIES, linux/netfilter_ipv4/ip_tables.h; the same numbers for IPv6, ip6_tables.h). Python's own getsockopt
cannot hand over the table's name, so libc's is called.
"""

import ctypes
import os
import socket
import struct
from hashlib import blake2b
from typing import NamedTuple

from services.enforcer.iptables import Family

_GET_INFO, _GET_ENTRIES = 64, 65
_NAME = 32
_INFO = struct.Struct("=32sI5I5III")
_ENTRIES_HEADER = 40
_LEVEL = {"ip": socket.IPPROTO_IP, "ip6": socket.IPPROTO_IPV6}
_DOMAIN = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}
_NEXT_OFFSET = {"ip": 90, "ip6": 142}
"""Where in an entry (struct ipt_entry, ip6t_entry) stands how long it is."""
_COUNTERS = {"ip": 96, "ip6": 152}
"""Where its packet and byte counters are: the only bytes that traffic changes."""
_COUNTERS_LENGTH = 16

_libc = ctypes.CDLL(None, use_errno=True)


class TableInfo(NamedTuple):
    """How many entries a table has (rules, and two for each chain that is not built in), and how many bytes."""

    entries: int
    size: int


def table_info(family: Family, table: str) -> TableInfo:
    """Some microseconds, whatever the table's size. Raises OSError (no such table, say)."""
    with _socket(family) as asked:
        return _info(asked, family, table)


def table_digest(family: Family, table: str) -> bytes:
    """A digest of all entries, in order, without their counters: 1 ms for each 1 000. Raises OSError; EAGAIN if the
    table changed while it was read."""
    with _socket(family) as asked:
        size = _info(asked, family, table).size
        question = table.encode().ljust(_NAME, b"\0") + struct.pack("=I", size)
        answer = _ask(asked, family, _GET_ENTRIES, question, _ENTRIES_HEADER + size)
    entries = bytearray(answer[_ENTRIES_HEADER:])
    return _without_counters(entries, _NEXT_OFFSET[family], _COUNTERS[family])


def _without_counters(entries: bytearray, next_offset: int, counters: int) -> bytes:
    zeros = bytes(_COUNTERS_LENGTH)
    length_of = struct.Struct("=H").unpack_from
    position, end = 0, len(entries)
    while position < end:
        entries[position + counters : position + counters + _COUNTERS_LENGTH] = zeros
        position += length_of(entries, position + next_offset)[0]
    return blake2b(entries, digest_size=16).digest()


def _socket(family: Family) -> socket.socket:
    return socket.socket(_DOMAIN[family], socket.SOCK_RAW, socket.IPPROTO_RAW)


def _info(asked: socket.socket, family: Family, table: str) -> TableInfo:
    answer = _ask(asked, family, _GET_INFO, table.encode().ljust(_NAME, b"\0"), _INFO.size)
    *_, entries, size = _INFO.unpack(answer)
    return TableInfo(entries, size)


def _ask(asked: socket.socket, family: Family, option: int, question: bytes, length: int) -> bytes:
    buffer = ctypes.create_string_buffer(question, length)
    given = ctypes.c_uint32(length)
    if _libc.getsockopt(asked.fileno(), _LEVEL[family], option, buffer, ctypes.byref(given)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buffer.raw
