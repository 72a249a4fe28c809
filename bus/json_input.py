"""Reading a client's JSON as the Go server did, for clients that rely on it (contract/policy.md 1.4).

Keys match in any case, the last of equal keys wins, null is as good as absent, unknown keys are ignored, bytes and
escapes that are not Unicode become U+FFFD. Types are strict: a number must be an integer, and 8080.0 is none. Keys come
out in lower case.
"""

import json
from typing import Any, NoReturn

from bus.decode import Malformed

Object = dict[str, Any]
_INT64 = 2**63


def parse(body: bytes) -> Object:
    """The JSON object in `body`; `null` is an empty one. Raises Malformed."""
    if not body.strip(b" \t\r\n"):
        raise Malformed("unexpected end of JSON input")
    try:
        value = json.loads(body.decode(errors="replace"), object_pairs_hook=_fold, parse_constant=_no_constant)
    except RecursionError:
        raise Malformed("exceeded max depth") from None
    except ValueError as error:
        raise Malformed(str(error)) from None
    return as_object(value, "the body")


def get_text(fields: Object, name: str, where: str) -> str:
    """A text, empty if absent."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise Malformed(f"{where}.{name} must be a string, not {_kind(value)}")
    if value.isascii():
        return value
    # Lone surrogates, which JSON escapes can make and UTF-8 cannot carry.
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def get_integer(fields: Object, name: str, where: str) -> int:
    """An integer of 64 bits, 0 if absent."""
    value = fields.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Malformed(f"{where}.{name} must be an integer, not {_kind(value)}")
    if not -_INT64 <= value < _INT64:
        raise Malformed(f"{where}.{name} does not fit into 64 bits")
    return value


def get_flag(fields: Object, name: str, where: str) -> bool:
    """A boolean, False if absent."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise Malformed(f"{where}.{name} must be a boolean, not {_kind(value)}")
    return value


def get_texts(fields: Object, name: str, where: str) -> list[str]:
    """A list of texts, empty if absent."""
    value = fields.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Malformed(f"{where}.{name} must be a list of strings")
    return value


def get_object(fields: Object, name: str, where: str) -> Object:
    """An object, empty if absent."""
    return as_object(fields.get(name), f"{where}.{name}")


def get_objects(fields: Object, name: str) -> list[Object]:
    """A list of objects, empty if absent."""
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise Malformed(f"{name} must be a list, not {_kind(value)}")
    return [as_object(item, f"{name}[{index}]") for index, item in enumerate(value)]


def as_object(value: object, where: str) -> Object:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Malformed(f"{where} must be an object, not {_kind(value)}")
    return value


def _fold(pairs: list[tuple[str, Any]]) -> Object:
    return {name.casefold(): value for name, value in pairs if value is not None}


def _no_constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is not JSON")


def _kind(value: object) -> str:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a fraction",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
