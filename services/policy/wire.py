"""What the versions of the external API have in common: how a list of policies is read and checked, and written.

The order of the checks and their texts are the contract's (contract/policy.md 1.5); ours are the checks of what ids are
made of, since the original left those to its database. A version adds its own form of ports.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from json.encoder import encode_basestring as quote
from typing import Protocol as Interface

from bus.decode import Malformed
from bus.json_input import Object, get_object, get_objects, get_text, parse
from bus.messages import MAX_APP_ID, AppId, Policy, Ports, Protocol

MAX_PORT = 65535


class Wire(Interface):
    """A version of the API's shapes."""

    def decode(self, body: bytes) -> list[Policy]:
        """The policies of a create or delete request. Raises Malformed with the contract's text."""

    def encode(self, policies: Iterable[Policy]) -> bytes:
        """The answer to a list request, with as many of the policies as the version can express."""


class Invalid(Exception):
    """A request that can be read but not carried out."""


class Shape(ABC):
    """One policy as the client gave it: every field read with its type, nothing checked yet."""

    def __init__(self, item: Object, where: str) -> None:
        source = get_object(item, "source", where)
        destination = get_object(item, "destination", where)
        self.source = get_text(source, "id", f"{where}.source")
        self.destination = get_text(destination, "id", f"{where}.destination")
        self.protocol = get_text(destination, "protocol", f"{where}.destination")
        self.tagged = bool(
            get_text(source, "tag", f"{where}.source") or get_text(destination, "tag", f"{where}.destination")
        )
        self.read_ports(destination, f"{where}.destination")

    @abstractmethod
    def read_ports(self, destination: Object, where: str) -> None:
        """Read what the version says of ports. Raises Malformed."""

    @abstractmethod
    def range(self) -> tuple[int, int]:
        """First and last port. Raises Invalid."""

    def policy(self) -> Policy:
        source = _app(self.source, "source")
        destination = _app(self.destination, "destination")
        if self.protocol not in ("tcp", "udp"):
            raise Invalid("invalid destination protocol, specify either udp or tcp")
        start, end = self.range()
        if self.tagged:
            raise Invalid("tags may not be specified")
        return Policy(source, destination, Ports(Protocol(self.protocol), start, end))


def decode(body: bytes, shape: type[Shape]) -> list[Policy]:
    """As `Wire.decode`. Every field of every policy is read before the first is checked, as a decoder would."""
    try:
        items = get_objects(parse(body), "policies")
        shapes = [shape(item, f"policies[{index}]") for index, item in enumerate(items)]
    except Malformed as error:
        raise Malformed(f"mapper: unmarshal json: {error}") from None
    try:
        if not shapes:
            raise Invalid("missing policies")
        return [item.policy() for item in shapes]
    except Invalid as error:
        raise Malformed(f"mapper: validate policies: {error}") from None


def encode(items: list[str]) -> bytes:
    """The list of policies, each already JSON."""
    return f'{{"total_policies":{len(items)},"policies":[{",".join(items)}]}}'.encode()


def encode_item(policy: Policy, ports: str) -> str:
    """A policy as JSON, compact, its keys in the contract's order; `ports` is the version's own field."""
    return (
        f'{{"source":{{"id":{quote(policy.source)}}},"destination":{{"id":{quote(policy.destination)},'
        f'"protocol":"{policy.ports.protocol.value}",{ports}}}}}'
    )


def _app(text: str, end: str) -> AppId:
    if not text:
        raise Invalid(f"missing {end} id")
    if len(text) > MAX_APP_ID:
        raise Invalid(f"invalid {end} id, must have at most {MAX_APP_ID} characters, not {len(text)}")
    if not text.isprintable() or text != text.strip():
        raise Invalid(f"invalid {end} id {text!a}, must be printable and not begin or end with a blank")
    return AppId(text)
