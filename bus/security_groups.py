"""Application security groups, as `bus.messages` has the other types: what containers may reach off the overlay.

The Cloud Controller's rules are texts with lists in them; these are typed, so that whoever enforces them has nothing to
parse and nothing to doubt. What the texts may be is the policy server's business (services/policy/asg_rules.py). IPv4
only, as containers have no other addresses.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NewType

from bus.decode import Fields, Malformed

GroupId = NewType("GroupId", str)
"""A security group: the GUID that the Cloud Controller gave it."""
SpaceId = NewType("SpaceId", str)
"""A space: the GUID that the Cloud Controller gave it."""

_NETWORK = re.compile(r"[0-9.]+/[0-9]{1,2}")


class EgressProtocol(StrEnum):
    """What a rule of a security group lets out; ALL is every protocol."""

    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"
    ALL = "all"


@dataclass(frozen=True, slots=True, order=True)
class AddressRange:
    """IPv4 addresses from `first` to `last`, both included."""

    first: IPv4Address
    last: IPv4Address

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise Malformed(f"addresses: {self.first}-{self.last} is no range, its start must not be after its end")

    def __str__(self) -> str:
        """An address, a network, or FIRST-LAST: the shortest that says it."""
        if self.first == self.last:
            return str(self.first)
        size = int(self.last) - int(self.first) + 1
        if size.bit_count() == 1 and int(self.first) % size == 0:
            return f"{self.first}/{32 - size.bit_length() + 1}"
        return f"{self.first}-{self.last}"

    @classmethod
    def parse(cls, text: str) -> "AddressRange":
        """An address, a network (host bits are taken as zero), or FIRST-LAST. Raises Malformed."""
        first, dash, last = text.partition("-")
        try:
            if dash:
                return cls(IPv4Address(first.strip()), IPv4Address(last.strip()))
            if "/" in text and not _NETWORK.fullmatch(text):
                raise ValueError  # IPv4Network also knows netmasks
            network = IPv4Network(text, strict=False)
        except Malformed:
            raise
        except ValueError:
            raise Malformed(f"addresses: {text[:50]!r} is no IPv4 address, network or range") from None
        return cls(network[0], network[-1])


@dataclass(frozen=True, slots=True)
class EgressRule:
    """Containers may open connections to `destinations`, which are never none.

    `ports` are inclusive ranges within 1..65535, some for tcp and udp, none for other protocols. `icmp_type` and
    `icmp_code` are of icmp alone, None for any; with any type goes any code. `log` says that flows are to be logged.
    """

    protocol: EgressProtocol
    destinations: tuple[AddressRange, ...]
    ports: tuple[tuple[int, int], ...] = ()
    icmp_type: int | None = None
    icmp_code: int | None = None
    log: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        has_ports = self.protocol in (EgressProtocol.TCP, EgressProtocol.UDP)
        if not self.destinations:
            raise Malformed("rule: destinations: missing")
        if has_ports != bool(self.ports):
            raise Malformed(f"rule: ports: {'required' if has_ports else 'not possible'} for {self.protocol}")
        for start, end in self.ports:
            if not 1 <= start <= end <= 65535:
                raise Malformed(f"rule: ports: {start}-{end} is not a range within 1-65535")
        for name, value in (("type", self.icmp_type), ("code", self.icmp_code)):
            if value is not None and not 0 <= value < 255:
                raise Malformed(f"rule: icmp {name}: must be in 0..254, not {value}")
            if value is not None and self.protocol is not EgressProtocol.ICMP:
                raise Malformed(f"rule: icmp {name}: not possible for {self.protocol}")
        if self.icmp_type is None and self.icmp_code is not None:
            raise Malformed("rule: icmp code: not possible for any type")

    def encode(self) -> dict[str, Any]:
        return {
            "protocol": str(self.protocol),
            "destinations": [str(item) for item in self.destinations],
            "ports": [list(item) for item in self.ports],
            "type": self.icmp_type,
            "code": self.icmp_code,
            "log": self.log,
            "description": self.description or None,
        }

    @classmethod
    def decode(cls, value: object, where: str = "rule") -> "EgressRule":
        fields = Fields(value, where)
        protocol = fields.text("protocol")
        if protocol not in tuple(EgressProtocol):
            raise fields.malformed("protocol", f"must be one of {', '.join(EgressProtocol)}, not {protocol!r}")
        ports = []
        for item in fields.items("ports"):
            match item:
                case [int(start), int(end)] if not isinstance(start, bool) and not isinstance(end, bool):
                    ports.append((start, end))
                case _:
                    raise fields.malformed("ports", f"must be lists of start and end, not {item!r}")
        return cls(
            EgressProtocol(protocol),
            tuple(AddressRange.parse(item) for item in _texts(fields, "destinations")),
            tuple(ports),
            fields.integer("type") if "type" in fields else None,
            fields.integer("code") if "code" in fields else None,
            fields.flag("log"),
            fields.optional_text("description") or "",
        )


@dataclass(frozen=True, slots=True)
class SecurityGroup:
    """An application security group: what containers of the spaces bound to it may reach, off the overlay.

    The defaults are bound to all spaces. Running is for apps and tasks, staging for the containers that build them.
    """

    guid: GroupId
    name: str
    rules: tuple[EgressRule, ...] = ()
    running_default: bool = False
    staging_default: bool = False
    running_spaces: frozenset[SpaceId] = frozenset()
    staging_spaces: frozenset[SpaceId] = frozenset()

    def encode(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rules": [rule.encode() for rule in self.rules],
            "running_default": self.running_default,
            "staging_default": self.staging_default,
            "running_spaces": sorted(self.running_spaces),
            "staging_spaces": sorted(self.staging_spaces),
        }

    @classmethod
    def decode(cls, guid: GroupId, value: object) -> "SecurityGroup":
        where = f"security group {guid!r}"
        fields = Fields(value, where)
        return cls(
            guid,
            fields.text("name"),
            tuple(EgressRule.decode(rule, f"{where}: rule {n}") for n, rule in enumerate(fields.items("rules"), 1)),
            fields.flag("running_default"),
            fields.flag("staging_default"),
            frozenset(map(SpaceId, _texts(fields, "running_spaces"))),
            frozenset(map(SpaceId, _texts(fields, "staging_spaces"))),
        )


def _texts(fields: Fields, name: str) -> list[str]:
    items = fields.items(name)
    if not all(isinstance(item, str) and item for item in items):
        raise fields.malformed(name, "must be texts, none of them empty")
    return list(items)


def security_group_key(guid: GroupId) -> tuple[str, ...]:
    return (guid,)


def decode_security_group_entry(key: tuple[str, ...], value: object) -> SecurityGroup:
    """A value of the `security_groups` table: GUID -> SecurityGroup."""
    match key:
        case (str(guid),):
            return SecurityGroup.decode(GroupId(guid), value)
    raise Malformed(f"security_groups table: no entry can be {key!r}")
