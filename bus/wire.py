"""What goes over NATS: msgpack maps that carry the version of the protocol.

Major versions do not understand each other and are refused; a reader ignores the fields that a newer minor version
added. Everything malformed raises `Malformed`, never anything else.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgpack

from bus.decode import Fields, Malformed

VERSION = (1, 0)


def pack(value: Any) -> bytes:
    """A plain value as msgpack. Equal values give equal bytes, as long as maps are built in one order."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: bytes, where: str) -> Any:
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except Exception as error:  # noqa: BLE001 (msgpack documents no common base for what bad input raises)
        raise Malformed(f"{where}: not msgpack: {error!r}") from None


def unpack_each(data: bytes, where: str) -> Iterator[Any]:
    """The values of which `data` is the concatenation."""
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=max(1, len(data)))
    try:
        unpacker.feed(data)
        yield from unpacker
    except Exception as error:  # noqa: BLE001 (as above)
        raise Malformed(f"{where}: not msgpack: {error!r}") from None
    if unpacker.tell() != len(data):
        raise Malformed(f"{where}: cut short")


def encode(message: Mapping[str, Any]) -> bytes:
    """A message for the bus. Values are what msgpack knows: text, bytes, numbers, lists, maps, None."""
    return pack({"version": list(VERSION), **message})


def decode(data: bytes, where: str) -> Fields:
    """A message from the bus; `where` names it in errors."""
    fields = Fields(unpack(data, where), where)
    match fields.items("version"):
        case [int(major), int(_)] if major == VERSION[0]:
            return fields
        case [int(major), int(minor)]:
            raise fields.malformed("version", f"{major}.{minor} is not understood here (this is {VERSION[0]}.x)")
    raise fields.malformed("version", "must be [major, minor]")
