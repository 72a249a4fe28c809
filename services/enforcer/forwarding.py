"""Port forwarding and masquerading: the nat chains.

    sb-nat       (a new flow from anywhere) for each of the cell's addresses that ports are forwarded at
    sb-p-tcpEE   ports EE00 to EEFF, in hexadecimal
    sb-p-tcpEE-4 ports EE40 to EE4F: to the container

Only a flow's first packet passes these tables. Whether what was translated may go on is decided in `sb-in`: it must
not have come from a container, or over the overlay; otherwise a policy must allow it, as if it was sent to the
container's own address and port.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address
from typing import NamedTuple

from bus.messages import Container, PortForward, Protocol
from services.enforcer.rules import TO_GUEST, ChainId, Chains, Rule, Rules, rule, to_link
from services.enforcer.settings import EnforcerSettings

NAT = ChainId("nat", "sb-nat")
FORWARDS = "sb-p"
"""What the names of all chains begin with that depend on which ports are forwarded."""


class Forward(NamedTuple):
    """One forwarded port, with all that is written for it. The first three say where packets arrive."""

    protocol: Protocol
    at: int
    port: int
    top: Rule
    block: str
    leaf: str
    rule: Rule


def forwarding_chains(containers: Iterable[Container], cell: IPv4Address | None) -> dict[ChainId, Rules]:
    """From an address and port of this cell to a container: three steps of at most 256, 16 and 16 rules an address.

    `cell` is where ports are forwarded if the container does not say. Of two that want the same, the later has it.
    """
    forwards = {
        forward[:3]: forward
        for container in containers
        if container.forwards and container.address is not None
        for forward in _forwards(container.forwards, container.address, cell)
    }
    tops: dict[Rule, None] = {}
    blocks: defaultdict[str, dict[str, Rule]] = defaultdict(dict)
    leaves: defaultdict[str, list[Rule]] = defaultdict(list)
    for key in sorted(forwards):
        forward = forwards[key]
        tops[forward.top] = None
        if forward.leaf not in leaves:
            span = _span(forward.protocol, forward.port >> 4 << 4, 4)
            blocks[forward.block].setdefault(forward.leaf, rule(span, to=forward.leaf))
        leaves[forward.leaf].append(forward.rule)
    chains = {ChainId("nat", leaf): tuple(rules) for leaf, rules in leaves.items()}
    chains |= {ChainId("nat", block): tuple(steps.values()) for block, steps in blocks.items()}
    return {NAT: tuple(tops), **chains}


@lru_cache(maxsize=1 << 12)
def _forwards(
    forwards: tuple[PortForward, ...], container: IPv4Address, cell: IPv4Address | None
) -> tuple[Forward, ...]:
    made = []
    for each in forwards:
        at = each.host_address or cell
        if at is None:
            continue
        port, protocol, block = each.host_port, each.protocol, port_chain(each.protocol, each.host_port)
        match = f"-d {at}/32 -p {protocol} -m {protocol} --dport {port}"
        made.append(
            Forward(
                protocol,
                int(at),
                port,
                rule(f"-d {at}/32", _span(protocol, port >> 8 << 8, 8), to=block),
                block,
                f"{block}-{port >> 4 & 0xF:x}",
                rule(match, to=f"DNAT --to-destination {container}:{each.container_port}"),
            )
        )
    return tuple(made)


def port_chain(protocol: Protocol, port: int) -> str:
    """The first of the chains that have this port."""
    return f"{FORWARDS}-{protocol}{port >> 8:02x}"


def _span(protocol: Protocol, first: int, bits: int) -> str:
    return f"-p {protocol} -m {protocol} --dport {first}:{first + (1 << bits) - 1}"


def static_nat(settings: EnforcerSettings, containers: str) -> Chains:
    """The nat chains that do not depend on containers; `containers` is the set of this cell's containers' addresses.

    What a container sends off the overlay gets the cell's address, but for the range that knows containers' own. One
    rule for all of them, since the set says who they are.
    """
    unchanged = settings.overlay_network if settings.no_masquerade is None else (settings.no_masquerade,)
    return {
        ChainId("nat", "PREROUTING"): (rule(to=NAT.name),),
        ChainId("nat", "POSTROUTING"): (rule(f"-m set --match-set {containers} src", to="sb-masquerade"),),
        ChainId("nat", "sb-masquerade"): (
            rule(to_link(settings.vtep_name), to="RETURN"),
            rule(to_link(f"{settings.link_prefix}+"), to="RETURN"),
            rule(TO_GUEST, to="RETURN"),
            *(rule(f"-d {network}", to="RETURN") for network in unchanged),
            rule(to="MASQUERADE"),
        ),
    }
