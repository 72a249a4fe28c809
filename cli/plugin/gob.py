"""Go's self-describing encoding, as far as net/rpc of the cf CLI needs it (https://pkg.go.dev/encoding/gob).

A stream is a sequence of messages; each defines a type or carries a value of one. In Python a struct is a dict of its
fields by name, a slice or array a list, a map a dict. As in Go, a field that is zero is not sent, so one that is
missing from a decoded struct is zero; a field that is a struct is sent if it is in the dict. What is received is read
by the definitions that came with it, whatever fields they have.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_ID = 64
"""The first type of our own, as in Go 1.27; a receiver takes any that is not built in."""
LONGEST = 64 << 20
"""Bytes of a message: nothing that cf says is near it."""


class BadGob(Exception):
    """What was received is no gob stream, or was cut off."""


@dataclass(frozen=True, slots=True)
class Basic:
    id: int


BOOL, INT, UINT, FLOAT, BYTES, STRING, COMPLEX, INTERFACE = (Basic(number) for number in range(1, 9))


@dataclass(frozen=True, slots=True)
class Slice:
    """`name` is Go's, which nobody compares."""

    name: str
    element: "Type"


@dataclass(frozen=True, slots=True)
class Map:
    name: str
    key: "Type"
    element: "Type"


@dataclass(frozen=True, slots=True)
class Struct:
    name: str
    fields: tuple[tuple[str, "Type"], ...]


Type = Basic | Slice | Map | Struct

_COMMON = Struct("CommonType", (("Name", STRING), ("Id", INT)))
_FIELD = Struct("fieldType", (("Name", STRING), ("Id", INT)))
_OWN = Struct("gobEncoderType", (("CommonType", _COMMON),))
_DEFINITION = Struct(
    "wireType",
    (
        ("ArrayT", Struct("arrayType", (("CommonType", _COMMON), ("Elem", INT), ("Len", INT)))),
        ("SliceT", Struct("sliceType", (("CommonType", _COMMON), ("Elem", INT)))),
        ("StructT", Struct("structType", (("CommonType", _COMMON), ("Field", Slice("", _FIELD))))),
        ("MapT", Struct("mapType", (("CommonType", _COMMON), ("Key", INT), ("Elem", INT)))),
        # Types that encode themselves: their values are bytes.
        ("GobEncoderT", _OWN),
        ("BinaryMarshalerT", _OWN),
        ("TextMarshalerT", _OWN),
    ),
)
"""A type's definition is itself sent as a value of this type, which both sides know."""


def uint(value: int) -> bytes:
    """A number below 2⁶⁴: one byte up to 127, else the count of its bytes, negated, and they, the highest first."""
    if value <= 0x7F:
        return bytes([value])
    length = (value.bit_length() + 7) // 8
    return bytes([256 - length]) + value.to_bytes(length, "big")


def integer(value: int) -> bytes:
    """A signed number: the sign in the lowest bit."""
    return uint(value << 1 if value >= 0 else (~value << 1) | 1)


class Encoder:
    """One direction of one stream."""

    def __init__(self, first_id: int = FIRST_ID) -> None:
        self._next = first_id
        self._ids: dict[Type, int] = {}
        self._sent: set[Type] = set()

    def encode(self, kind: Type, value: Any) -> bytes:
        """The messages that carry a value: the definitions that were not yet sent, and the value."""
        number = self._id(kind)
        # A value that is no struct is sent like the first field of one.
        body = self._value(kind, value) if isinstance(kind, Struct) else b"\0" + self._value(kind, value)
        return self._definitions(kind) + _message(number, body)

    def _id(self, kind: Type) -> int:
        """The type's number. Go numbers a struct before its fields, but a slice or map after its elements."""
        if isinstance(kind, Basic):
            return kind.id
        if kind not in self._ids:
            match kind:
                case Struct():
                    self._number(kind)
                    for _, field in kind.fields:
                        self._id(field)
                case Slice():
                    self._id(kind.element)
                    self._number(kind)
                case Map():
                    self._id(kind.key)
                    self._id(kind.element)
                    self._number(kind)
        return self._ids[kind]

    def _number(self, kind: Type) -> None:
        self._ids[kind] = self._next
        self._next += 1

    def _definitions(self, kind: Type) -> bytes:
        if isinstance(kind, Basic) or kind in self._sent:
            return b""
        self._sent.add(kind)
        common = {"Name": kind.name, "Id": self._id(kind)}
        match kind:
            case Slice():
                inner: tuple[Type, ...] = (kind.element,)
                definition: Any = {"SliceT": {"CommonType": common, "Elem": self._id(kind.element)}}
            case Map():
                inner = kind.key, kind.element
                ids = {"Key": self._id(kind.key), "Elem": self._id(kind.element)}
                definition = {"MapT": {"CommonType": common, **ids}}
            case Struct():
                inner = tuple(field for _, field in kind.fields)
                fields = [{"Name": name, "Id": self._id(field)} for name, field in kind.fields]
                definition = {"StructT": {"CommonType": common, "Field": fields}}
        message = _message(-self._id(kind), self._value(_DEFINITION, definition))
        return message + b"".join(self._definitions(part) for part in inner)

    def _value(self, kind: Type, value: Any) -> bytes:
        match kind:
            case Struct():
                return self._struct(kind, value)
            case Slice():
                return uint(len(value)) + b"".join(self._value(kind.element, item) for item in value)
            case Map():
                pairs = (self._value(kind.key, key) + self._value(kind.element, item) for key, item in value.items())
                return uint(len(value)) + b"".join(pairs)
        return _ENCODE[kind](value)

    def _struct(self, kind: Struct, value: Any) -> bytes:
        sent, last = b"", -1
        for number, (name, field) in enumerate(kind.fields):
            if name not in value or not (value[name] or isinstance(field, Struct)):
                continue
            sent += uint(number - last) + self._value(field, value[name])
            last = number
        return sent + b"\0"


def _message(number: int, body: bytes) -> bytes:
    content = integer(number) + body
    return uint(len(content)) + content


def _float(value: float) -> bytes:
    # The bytes are turned round, so that those of a small whole number, mostly zero, are left out.
    return uint(int.from_bytes(struct.pack("<d", value), "big"))


def _bytes(value: bytes) -> bytes:
    return uint(len(value)) + value


_ENCODE: dict[Basic, Callable[[Any], bytes]] = {
    BOOL: lambda value: uint(bool(value)),
    INT: integer,
    UINT: uint,
    FLOAT: _float,
    BYTES: _bytes,
    STRING: lambda value: _bytes(value.encode()),
    COMPLEX: lambda value: _float(value.real) + _float(value.imag),
}


class _Message:
    """The bytes of one message, read from the front."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._content) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise BadGob(f"{count} bytes announced, and {self.left} left")
        self._at += count
        return self._content[self._at - count : self._at]

    def uint(self) -> int:
        return read_uint(self.take)

    def signed(self) -> int:
        value = self.uint()
        return ~(value >> 1) if value & 1 else value >> 1

    def number(self) -> float:
        (value,) = struct.unpack("<d", self.uint().to_bytes(8, "big"))
        return float(value)

    def block(self) -> bytes:
        return self.take(self.uint())

    def text(self) -> str:
        return self.block().decode(errors="replace")

    def count(self) -> int:
        """The length of a list; each of its items takes a byte at least."""
        value = self.uint()
        if value > self.left:
            raise BadGob(f"{value} items announced, and {self.left} bytes left")
        return value


def read_uint(take: Callable[[int], bytes]) -> int:
    """A number, of bytes got by `take`. Raises BadGob."""
    first = take(1)[0]
    if first <= 0x7F:
        return first
    if 256 - first > 8:
        raise BadGob(f"a number of {256 - first} bytes")
    return int.from_bytes(take(256 - first), "big")


class Decoder:
    """One direction of one stream; `take` brings exactly as many bytes as it is asked for, or raises."""

    def __init__(self, take: Callable[[int], bytes]) -> None:
        self._take = take
        self._definitions: dict[int, tuple[str, Any]] = {}

    def decode(self) -> Any:
        """The next value. Raises BadGob, and what `take` raises."""
        while True:
            length = read_uint(self._take)
            if length > LONGEST:
                raise BadGob(f"a message of {length} bytes")
            message = _Message(self._take(length))
            try:
                number = message.signed()
                if number >= 0:
                    return self._top(number, message)
                self._define(-number, message)
            except (KeyError, TypeError, RecursionError) as error:
                raise BadGob(f"a value of a type that is not, or badly, defined: {error!r}") from None

    def _define(self, number: int, message: _Message) -> None:
        definition = self._known(_DEFINITION, message)
        if len(definition) != 1:
            raise BadGob(f"type {number} is defined in {len(definition)} ways")
        ((kind, content),) = definition.items()
        self._definitions[number] = kind, content

    def _top(self, number: int, message: _Message) -> Any:
        """A value by itself: with a zero before it, unless it is a struct."""
        if self._definitions.get(number, ("",))[0] != "StructT" and message.uint() != 0:
            raise BadGob("a value that is no struct must begin with a zero")
        return self._value(number, message)

    def _value(self, number: int, message: _Message) -> Any:
        if number in _DECODE:
            return _DECODE[number](message)
        if number == INTERFACE.id:
            return self._interface(message)
        kind, content = self._definitions[number]
        match kind:
            case "StructT":
                fields = content.get("Field", [])
                return _fields(message, [(field["Name"], field["Id"]) for field in fields], self._value)
            case "SliceT" | "ArrayT":
                return [self._value(content["Elem"], message) for _ in range(message.count())]
            case "MapT":
                pairs = range(message.count())
                return {self._value(content["Key"], message): self._value(content["Elem"], message) for _ in pairs}
        return message.block()

    def _interface(self, message: _Message) -> Any:
        """The value within, None for nil: the type's name, its number, after definitions if need be, and its length."""
        if not message.text():
            return None
        while (number := message.signed()) < 0:
            self._define(-number, message)
            message.uint()  # the length of what follows
        return self._top(number, _Message(message.block()))

    def _known(self, kind: Type, message: _Message) -> Any:
        """A value of a type that needs no definition."""
        match kind:
            case Struct():
                return _fields(message, kind.fields, self._known)
            case Slice():
                return [self._known(kind.element, message) for _ in range(message.count())]
            case Basic():
                return _DECODE[kind.id](message)
        raise BadGob("definitions have no maps")


def _fields(message: _Message, fields: Sequence[tuple[str, Any]], decode: Callable[[Any, _Message], Any]) -> Any:
    found, at = {}, -1
    while step := message.uint():
        at += step
        if at >= len(fields):
            raise BadGob(f"field {at} of a struct that has {len(fields)}")
        name, kind = fields[at]
        found[name] = decode(kind, message)
    return found


_DECODE: dict[int, Callable[[_Message], Any]] = {
    BOOL.id: lambda message: message.uint() != 0,
    INT.id: _Message.signed,
    UINT.id: _Message.uint,
    FLOAT.id: _Message.number,
    BYTES.id: _Message.block,
    STRING.id: _Message.text,
    COMPLEX.id: lambda message: complex(message.number(), message.number()),
}
