"""JSON as Go's decoder reads it, because Garden's callers and its users know the original's manners.

Keys match whatever their case, unknown ones are ignored, null is as if absent, only the first value of a text is read,
and what is not Unicode becomes U+FFFD. Errors have Go's texts for what people are likely to see (contract/cell.md 1.3).
"""

import json
from collections.abc import Mapping
from typing import Any

from bus.decode import Malformed

_KINDS = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
_GO = {"int": int, "map": dict, "slice": list, "string": str, "bool": bool}
# The texts of Python's json.JSONDecodeError, word for word, and what Go's decoder calls the same fault.
_EXPECTED = {
    "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
    "Illegal trailing comma before end of object": "looking for beginning of object key string",
    "Expecting value": "looking for beginning of value",
    "Illegal trailing comma before end of array": "looking for beginning of value",
    "Expecting ':' delimiter": "after object key",
    "Expecting ',' delimiter": "after object key:value pair or array element",
    "Invalid control character at": "in string literal",
    "Invalid \\escape": "in string escape code",
    "Invalid \\uXXXX escape": "in \\u hexadecimal character escape",
}


def first_value(text: str) -> Any:
    """The first JSON value of a text. Raises Malformed."""
    start = len(text) - len(text.lstrip(" \t\r\n"))
    if start == len(text):
        raise Malformed("EOF")
    try:
        value, _ = json.JSONDecoder(parse_constant=_no_constant).raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise Malformed(_told(text, error)) from None
    except RecursionError:
        raise Malformed("exceeded max depth") from None
    return _unicode(value)


def whole_value(text: str) -> Any:
    """The one JSON value that a text is. Raises Malformed."""
    value = first_value(text)
    _, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
    if rest := text[end:].strip(" \t\r\n"):
        raise Malformed(f"invalid character {_quoted(rest[0])} after top-level value")
    return value


class Struct:
    """A JSON object read into a struct called `name`. None reads as an empty one."""

    def __init__(self, value: Any, name: str, package: str = "") -> None:
        if value is not None and not isinstance(value, dict):
            raise Malformed(f"json: cannot unmarshal {kind(value)} into Go value of type {package}{name}")
        self.name = name
        self.values: dict[str, Any] = {}
        for key, item in (value or {}).items():
            if item is not None:  # null leaves what was there
                self.values[key.casefold()] = item

    def get(self, key: str, go: str, default: Any, *, told: str = "") -> Any:
        """What `key` holds, of the Go type `go` (int, map, slice, string, bool); `default` if nothing."""
        value = self.values.get(key.casefold())
        if value is None:
            return default
        expected = _GO[go.partition("[")[0] if not go.startswith("[]") else "slice"]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            number = f" {value}" if isinstance(value, float) else ""
            raise Malformed(
                f"json: cannot unmarshal {kind(value)}{number} into Go struct field {self.name}.{told or key} of type "
                f"{go}"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise Malformed(f"json: cannot unmarshal number {value} into Go struct field {self.name}.{key} of type int")
        return value


def kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def go_output(value: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """One line of JSON as Go's encoder prints it: no blanks, and `<>&` escaped, for those who put it into HTML.

    Go sorts the keys of maps, but not the fields of structs.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=sort_keys)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"


def _no_constant(name: str) -> Any:
    raise Malformed(f"invalid character {_quoted(name[0])} looking for beginning of value")


def _told(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
        return "unexpected EOF"
    return f"invalid character {_quoted(text[error.pos])} {_EXPECTED.get(error.msg, error.msg)}"


def _quoted(character: str) -> str:
    return (
        "'\\''" if character == "'" else f"'{character}'" if character.isprintable() else f"'\\x{ord(character):02x}'"
    )


def _unicode(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list():
            return [_unicode(item) for item in value]
        case dict():
            return {_unicode(key): _unicode(item) for key, item in value.items()}
    return value
