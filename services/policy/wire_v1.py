"""Version v1 of the external API's shapes: policies with port ranges (contract/policy.md 1.4, 1.5).

The order of the checks and their texts are the contract's; ours are the checks of what ids are made of, since the
original left those to its database.
"""

import json
from collections.abc import Iterable

from bus.decode import Malformed
from bus.messages import MAX_APP_ID, AppId, Policy, Ports, Protocol
from services.policy.json_input import Object, get_integer, get_object, get_objects, get_text, parse

MAX_PORT = 65535


def decode(body: bytes) -> list[Policy]:
    """The policies of a create or delete request. Raises Malformed with the contract's text."""
    try:
        items = get_objects(parse(body), "policies")
        return _validate(items)
    except Malformed as error:
        raise Malformed(f"mapper: unmarshal json: {error}") from None
    except Invalid as error:
        raise Malformed(f"mapper: validate policies: {error}") from None


class Invalid(Exception):
    """A request that can be read but not carried out."""


def _validate(items: list[Object]) -> list[Policy]:
    shapes = [_Shape(item, f"policies[{index}]") for index, item in enumerate(items)]
    if not shapes:
        raise Invalid("missing policies")
    return [shape.policy() for shape in shapes]


class _Shape:
    """One policy as the client gave it: every field read with its type, nothing checked yet."""

    def __init__(self, item: Object, where: str) -> None:
        source = get_object(item, "source", where)
        destination = get_object(item, "destination", where)
        ports = get_object(destination, "ports", f"{where}.destination")
        self.source = get_text(source, "id", f"{where}.source")
        self.destination = get_text(destination, "id", f"{where}.destination")
        self.protocol = get_text(destination, "protocol", f"{where}.destination")
        self.start = get_integer(ports, "start", f"{where}.destination.ports")
        self.end = get_integer(ports, "end", f"{where}.destination.ports")
        self.tagged = bool(
            get_text(source, "tag", f"{where}.source") or get_text(destination, "tag", f"{where}.destination")
        )

    def policy(self) -> Policy:
        source = _app(self.source, "source")
        destination = _app(self.destination, "destination")
        if self.protocol not in ("tcp", "udp"):
            raise Invalid("invalid destination protocol, specify either udp or tcp")
        if self.start > self.end:
            raise Invalid(f"invalid port range {self.start}-{self.end}, start must be less than or equal to end")
        if self.start < 0:
            raise Invalid(f"invalid start port {self.start}, must be in range 1-65535")
        if self.start == 0:
            raise Invalid("missing start port")
        if self.end > MAX_PORT:
            raise Invalid(f"invalid end port {self.end}, must be in range 1-65535")
        if self.tagged:
            raise Invalid("tags may not be specified")
        return Policy(source, destination, Ports(Protocol(self.protocol), self.start, self.end))


def _app(text: str, end: str) -> AppId:
    if not text:
        raise Invalid(f"missing {end} id")
    if len(text) > MAX_APP_ID:
        raise Invalid(f"invalid {end} id, must have at most {MAX_APP_ID} characters, not {len(text)}")
    if not text.isprintable() or text != text.strip():
        raise Invalid(f"invalid {end} id {text!a}, must be printable and not begin or end with a blank")
    return AppId(text)


def encode(policies: Iterable[Policy]) -> bytes:
    """The answer to a list request."""
    items = [
        {
            "source": {"id": policy.source},
            "destination": {
                "id": policy.destination,
                "protocol": policy.ports.protocol,
                "ports": {"start": policy.ports.start, "end": policy.ports.end},
            },
        }
        for policy in policies
    ]
    answer = {"total_policies": len(items), "policies": items}
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()
