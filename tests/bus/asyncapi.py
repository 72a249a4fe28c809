"""docs/asyncapi.yaml as a validator of recorded messages.

JSON Schema knows no bytes. Here a text with `contentEncoding: binary` is bytes, and `x-content-schema` is applied to
what they hold. And what the document does not name is an error, though readers must ignore it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

DOCUMENT = yaml.safe_load((Path(__file__).parents[2] / "docs" / "asyncapi.yaml").read_text())


def _type(validator: Any, types: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if schema.get("contentEncoding") == "binary":
        if not isinstance(instance, bytes):
            yield ValidationError(f"{instance!r} is not bytes")
    else:
        yield from Draft7Validator.VALIDATORS["type"](validator, types, instance, schema)


def _length(compare: Any) -> Any:
    def check(_: Any, limit: int, instance: Any, __: Any) -> Iterator[ValidationError]:
        if isinstance(instance, (str, bytes)) and not compare(len(instance), limit):
            yield ValidationError(f"{instance!r} has the wrong length")

    return check


def _content(validator: Any, schema: Any, instance: Any, _: Any) -> Iterator[ValidationError]:
    if isinstance(instance, bytes):
        yield from validator.descend(msgpack.unpackb(instance), schema)


def _properties(validator: Any, properties: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    for name in set(instance) - set(properties) if isinstance(instance, dict) else ():
        yield ValidationError(f"{name!r} is not documented")
    yield from Draft7Validator.VALIDATORS["properties"](validator, properties, instance, schema)


_Validator = extend(
    Draft7Validator,
    {
        "type": _type,
        "minLength": _length(lambda length, limit: length >= limit),
        "maxLength": _length(lambda length, limit: length <= limit),
        "x-content-schema": _content,
        "properties": _properties,
    },
)
_REGISTRY = Registry().with_resource("asyncapi", Resource.from_contents(DOCUMENT, default_specification=DRAFT7))


def validate(pointer: str, value: Any) -> None:
    """Raises ValidationError unless `value` fits the schema at `pointer` ("#/components/…") of the document."""
    schema = {"$ref": f"asyncapi{pointer}"}
    _Validator(schema, registry=_REGISTRY, format_checker=Draft7Validator.FORMAT_CHECKER).validate(value)


def fits(pointer: str, value: Any) -> bool:
    try:
        validate(pointer, value)
    except ValidationError:
        return False
    return True


@dataclass(frozen=True)
class Channel:
    name: str
    pattern: re.Pattern[str] | None
    """The subjects of the channel; None for answers."""
    messages: tuple[str, ...]
    answers: str | None
    """The channel of the answers to what is sent here."""

    def message(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
        """Which of its messages this is. Raises AssertionError or ValidationError for none."""
        if len(self.messages) > 1:
            found = [name for name in self.messages if fits(f"#/components/messages/{name}/payload", body)]
            assert len(found) == 1, f"{self.name}: {body} fits {found or 'none'} of {self.messages}"
            return found[0]
        (name,) = self.messages
        validate(f"#/components/messages/{name}/payload", body)
        if "headers" in DOCUMENT["components"]["messages"][name]:
            validate(f"#/components/messages/{name}/headers", dict(headers))
            assert headers["ce-type"] == DOCUMENT["components"]["messages"][name]["x-event-type"]
        return name


def channels() -> dict[str, Channel]:
    answers = {
        _name(operation["channel"]): _name(operation["reply"]["channel"])
        for operation in DOCUMENT["operations"].values()
        if "reply" in operation
    }
    return {
        name: Channel(
            name,
            None
            if channel["address"] is None
            else re.compile(re.sub(r"\\\{\w+\\\}", "[^.]+", re.escape(channel["address"]))),
            tuple(_name(message) for message in channel["messages"].values()),
            answers.get(name),
        )
        for name, channel in DOCUMENT["channels"].items()
    }


def _name(reference: Mapping[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]
