"""What the Cloud Controller says of a security group, read strictly (CC API v3; contract/cell.md 2.5).

A rule's addresses and ports are comma-separated lists in texts. The original's agents take what they can of them: they
wrap port 70000 to 4464, match only ICMP code 255 where any code was meant, and give a container no rules at all for one
address they cannot read. Here a rule that is not wholly understood is left out, by itself, and named.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network
from typing import Any

from bus.decode import Fields, Malformed
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SecurityGroup, SpaceId

MAX_GUID = 255
MAX_NAME = 255
MAX_DESCRIPTION = 1000
"""The rest of a description is cut off: nothing depends on it, and every cell holds it."""
MAX_LIST = 1 << 20
ANY = (-1, 255)
"""ICMP types and codes that stand for any (contract/policy.md 3)."""
_PORTS = re.compile(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Listed:
    """One group as listed. `bad_rules` says of each rule that was left out which it is, and why."""

    group: SecurityGroup
    bad_rules: tuple[str, ...]


def parse_group(item: Fields) -> Listed:
    """A resource of `GET /v3/security_groups`. Raises Malformed for what is wrong outside the rules."""
    guid, name = GroupId(item.text("guid", max_length=MAX_GUID)), item.text("name", max_length=MAX_NAME)
    enabled = Fields(item.mapping("globally_enabled"), f"{item.where}: globally_enabled")
    rules, bad = parse_rules(item.items("rules"))
    group = SecurityGroup(
        guid,
        name,
        rules,
        running_default=enabled.flag("running"),
        staging_default=enabled.flag("staging"),
        running_spaces=_spaces(item, "running_spaces"),
        staging_spaces=_spaces(item, "staging_spaces"),
    )
    return Listed(group, tuple(f"security group {name!r} ({guid}): {problem}" for problem in bad))


def parse_rules(items: Sequence[Any]) -> tuple[tuple[EgressRule, ...], list[str]]:
    """The rules of a group, and what is wrong with those that are left out. They are counted from 1."""
    rules, bad = [], []
    for number, item in enumerate(items, 1):
        try:
            rules.append(parse_rule(item, f"rule {number}"))
        except Malformed as error:
            bad.append(str(error))
    return tuple(rules), bad


def parse_rule(value: object, where: str = "rule") -> EgressRule:
    """One rule. Raises Malformed, and says what is wrong with it.

    Fields that are empty or null are as absent: so the original stores them. A type and code mean nothing but to icmp.
    """
    given = {key: item for key, item in value.items() if item != ""} if isinstance(value, Mapping) else value
    fields = Fields(given, where)
    protocol = fields.text("protocol")
    if protocol == "icmpv6":
        raise fields.malformed("protocol", "icmpv6: containers have no IPv6")
    if protocol not in tuple(EgressProtocol):
        raise fields.malformed("protocol", f"must be one of {', '.join(EgressProtocol)}, not {protocol[:50]!r}")
    is_icmp = protocol == EgressProtocol.ICMP
    icmp_type = _icmp(fields, "type") if is_icmp else None
    icmp_code = _icmp(fields, "code") if is_icmp else None
    if icmp_type is None and icmp_code is not None:
        raise fields.malformed("code", "any type goes with any code (-1) only")
    try:
        return EgressRule(
            EgressProtocol(protocol),
            _destinations(fields),
            _ports(fields),
            icmp_type,
            icmp_code,
            fields.flag("log") if "log" in fields else False,
            _description(fields),
        )
    except Malformed as error:
        text = str(error)
        raise Malformed(text if text.startswith(where) else f"{where}: {text.removeprefix('rule: ')}") from None


def _destinations(fields: Fields) -> tuple[AddressRange, ...]:
    ranges = []
    for part in fields.text("destination", max_length=MAX_LIST).split(","):
        try:
            ranges.append(AddressRange.parse(part.strip()))
        except Malformed as error:
            if _is_ipv6(part):
                raise fields.malformed("destination", f"{part.strip()}: containers have no IPv6") from None
            raise fields.malformed("destination", str(error)) from None
    return tuple(ranges)


def _ports(fields: Fields) -> tuple[tuple[int, int], ...]:
    ranges = []
    text = fields.optional_text("ports", max_length=MAX_LIST)
    for part in text.split(",") if text is not None else ():
        found = _PORTS.fullmatch(part.strip())
        if not found:
            raise fields.malformed("ports", f"{part.strip()[:50]!r} is neither a port nor a range of ports")
        start = int(found[1])
        ranges.append((start, int(found[2] or start)))
    return tuple(ranges)


def _icmp(fields: Fields, name: str) -> int | None:
    value = fields.integer(name, low=-1, high=255)
    return None if value in ANY else value


def _description(fields: Fields) -> str:
    text = fields.optional_text("description", max_length=MAX_LIST) or ""
    return text[:MAX_DESCRIPTION]


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Network(text.strip().partition("-")[0], strict=False)
    except ValueError:
        return False
    return True


def _spaces(item: Fields, name: str) -> frozenset[SpaceId]:
    where = f"{item.where}: relationships"
    bound = Fields(item.mapping("relationships"), where).mapping(name)
    data = Fields(bound, f"{where}.{name}").items("data")
    return frozenset(SpaceId(Fields(space, f"{where}.{name}.data").text("guid", max_length=MAX_GUID)) for space in data)
