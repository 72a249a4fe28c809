"""Garden's egress rules (NetOut) as ours: contract/cell.md 1.3 for their form, 2.5 for which of them are valid.

A rule that is not valid lets nothing out, and does not keep the others from doing so: it is left out, and said. A rule
without networks is for all addresses, as Garden's API has it; so `{}`, in which Guardian leaves out what is zero,
allows everything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bus.decode import Fields, Malformed
from bus.security_groups import AddressRange, EgressProtocol, EgressRule

_PROTOCOLS = {0: EgressProtocol.ALL, 1: EgressProtocol.TCP, 2: EgressProtocol.UDP, 3: EgressProtocol.ICMP}
_EVERYWHERE = AddressRange.parse("0.0.0.0/0")
_ANY = 255
"""In 8 bits what -1 is elsewhere: any ICMP type or code."""


def egress_rules(rules: Sequence[Any], where: str) -> tuple[tuple[EgressRule, ...], list[str]]:
    """The valid rules, in order, and what is wrong with each other one; `where` and its place name it there."""
    valid, problems = [], []
    for number, rule in enumerate(rules):
        try:
            valid.append(_rule(Fields(rule, f"{where}[{number}]")))
        except Malformed as error:
            problems.append(str(error))
    return tuple(valid), problems


def _rule(fields: Fields) -> EgressRule:
    number = fields.integer("protocol") if "protocol" in fields else 0
    if number not in _PROTOCOLS:
        raise fields.malformed("protocol", f"must be 0 (all), 1 (tcp), 2 (udp) or 3 (icmp), not {number}")
    protocol = _PROTOCOLS[number]
    networks = _list(fields, "networks")
    destinations = [_network(Fields(item, f"{fields.where}: networks")) for item in networks] or [_EVERYWHERE]
    ports = [_ports(Fields(item, f"{fields.where}: ports")) for item in _list(fields, "ports")]
    has_ports = protocol in (EgressProtocol.TCP, EgressProtocol.UDP)
    if has_ports and not ports:
        raise fields.malformed("ports", "UDP/TCP rule must specify ports")
    if ports and not has_ports:
        raise fields.malformed("ports", f"{'ICMP rule' if number else 'rule for all protocols'} must not specify ports")
    icmp_type, icmp_code = _icmp(fields) if protocol is EgressProtocol.ICMP else (None, None)
    try:
        return EgressRule(
            protocol,
            tuple(destinations),
            tuple(ports),
            icmp_type,
            icmp_code,
            log=fields.flag("log") if "log" in fields else False,
        )
    except Malformed as error:
        raise Malformed(f"{fields.where}: {error}") from None


def _list(fields: Fields, name: str) -> Sequence[Any]:
    return fields.items(name) if name in fields else ()


def _network(fields: Fields) -> AddressRange:
    """A range of which one end may be missing: then it is one address."""
    if "start" not in fields and "end" not in fields:
        raise fields.malformed("start", "missing, and so is the end")
    ends = [fields.address(name) for name in ("start", "end") if name in fields]
    try:
        return AddressRange(ends[0], ends[-1])
    except Malformed as error:
        raise Malformed(f"{fields.where}: {error}") from None


def _ports(fields: Fields) -> tuple[int, int]:
    start = fields.integer("start", low=1, high=65535)
    return start, fields.integer("end", low=1, high=65535) if "end" in fields else start


def _icmp(fields: Fields) -> tuple[int | None, int | None]:
    if "icmps" not in fields:
        raise fields.malformed("icmps", "ICMP rule must specify ICMP type/code")
    icmps = Fields(fields.mapping("icmps"), f"{fields.where}: icmps")
    if "code" not in icmps:
        raise icmps.malformed("code", "ICMP rule must specify ICMP type/code")
    values: Mapping[str, int] = {
        name: icmps.integer(name, high=_ANY) if name in icmps else 0 for name in ("type", "code")
    }
    if values["type"] == _ANY:
        return None, None
    return values["type"], None if values["code"] == _ANY else values["code"]
