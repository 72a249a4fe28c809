"""Reading untrusted mappings (msgpack from the bus, JSON from files and sockets) field by field.

Every field is taken with the type it must have; anything else raises `Malformed`, whose text names the place and the
field. Unknown fields are ignored, so that a reader one minor version behind its writer works.
"""

import math
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any


class Malformed(ValueError):
    """A message or record that does not have the form it must have. The text says what is wrong and where."""


class Fields:
    """One mapping, read field by field. `where` names it in errors, as "lease 10.255.7.0/24"."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise Malformed(f"{where}: must be a mapping, not {_kind(value)}")
        self._values: Mapping[Any, Any] = value
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def malformed(self, name: str, problem: str) -> Malformed:
        return Malformed(f"{self.where}: {name}: {problem}")

    def _typed(self, name: str, kind: type | tuple[type, ...], called: str) -> Any:
        value = self._values.get(name)
        if value is None:
            raise self.malformed(name, "missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.malformed(name, f"must be {called}, not {_kind(value)}")
        return value

    def text(self, name: str, *, max_length: int = 4096) -> str:
        value: str = self._typed(name, str, "text")
        if not value:
            raise self.malformed(name, "must not be empty")
        if "\0" in value or not _is_unicode(value):
            # JSON can say both; neither can be a file's name, or go into every database or on the bus.
            raise self.malformed(name, "must be Unicode text without NUL")
        if len(value) > max_length:
            raise self.malformed(name, f"is longer than {max_length} characters")
        return value

    def optional_text(self, name: str, *, max_length: int = 4096) -> str | None:
        return self.text(name, max_length=max_length) if name in self else None

    def integer(self, name: str, *, low: int = 0, high: int = 2**63 - 1) -> int:
        value: int = self._typed(name, int, "an integer")
        if not low <= value <= high:
            raise self.malformed(name, f"must be in {low}..{high}, not {value}")
        return value

    def number(self, name: str) -> float:
        try:
            value = float(self._typed(name, (int, float), "a number"))
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise self.malformed(name, "must be a finite number")
        return value

    def flag(self, name: str) -> bool:
        return bool(self._typed(name, bool, "true or false"))

    def data(self, name: str) -> bytes:
        value: bytes = self._typed(name, bytes, "bytes")
        return value

    def items(self, name: str) -> Sequence[Any]:
        value: Sequence[Any] = self._typed(name, (list, tuple), "a list")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value: Mapping[str, Any] = self._typed(name, Mapping, "a mapping")
        return value

    def address(self, name: str) -> IPv4Address:
        value = self.text(name)
        try:
            return IPv4Address(value)
        except ValueError:
            raise self.malformed(name, f"not an IPv4 address: {value!r}") from None

    def network(self, name: str) -> IPv4Network:
        value = self.text(name)
        try:
            return IPv4Network(value)
        except ValueError:
            raise self.malformed(name, f"not an IPv4 network: {value!r}") from None


def _is_unicode(value: str) -> bool:
    """Whether it is without halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
