"""Port forwarding and masquerading: the nat chains.

    sb-nat       (a new flow from anywhere) for each of the cell's addresses that ports are forwarded at
    sb-p-tcpEE   ports EE00 to EEFF, in hexadecimal
    sb-p-tcpEE-4 ports EE40 to EE4F: to the container

Only a flow's first packet passes these tables. Whether what was translated may go on is decided in `sb-in`: it must
not have come from a container, or over the overlay; otherwise a policy must allow it, as if it was sent to the
container's own address and port.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address
from typing import NamedTuple

from bus.messages import Container, Protocol
from services.enforcer.rules import TO_GUEST, ChainId, Chains, Rule, Rules, rule, to_link
from services.enforcer.settings import EnforcerSettings

NAT = ChainId("nat", "sb-nat")
FORWARDS = "sb-p"
"""What the names of all chains begin with that depend on which ports are forwarded."""


class At(NamedTuple):
    """Where packets arrive that are forwarded."""

    protocol: Protocol
    address: IPv4Address
    port: int


class Target(NamedTuple):
    """Where they go: a container."""

    address: IPv4Address
    port: int


def translations(containers: Iterable[Container], cell: IPv4Address | None) -> dict[At, Target]:
    """What these containers have forwarded to them; `cell` is where, if they do not say. Of two the later has it."""
    return {
        At(forward.protocol, arriving, forward.host_port): Target(container.address, forward.container_port)
        for container in containers
        for forward in container.forwards
        if container.address is not None and (arriving := forward.host_address or cell) is not None
    }


def forwarding_chains(forwards: Mapping[At, Target]) -> dict[ChainId, Rules]:
    """From an address and port of this cell to a container: three steps of at most 256, 16 and 16 rules an address."""
    blocks: defaultdict[str, defaultdict[str, list[Rule]]] = defaultdict(lambda: defaultdict(list))
    tops: dict[tuple[IPv4Address, str], Rule] = {}
    for at in sorted(forwards):
        block = port_chain(at.protocol, at.port)
        blocks[block][f"{block}-{at.port >> 4 & 0xF:x}"].append(_forward(at, forwards[at]))
        tops[at.address, block] = rule(f"-d {at.address}/32", _ports(at, 8), to=block)
    chains: dict[ChainId, Rules] = {NAT: tuple(tops[key] for key in sorted(tops))}
    for block, leaves in blocks.items():
        for leaf, rules in leaves.items():
            chains[ChainId("nat", leaf)] = tuple(rules)
        protocol, high = block[5:8], int(block[8:], 16) << 8
        chains[ChainId("nat", block)] = tuple(
            rule(_span(protocol, high + (int(leaf[-1], 16) << 4), 4), to=leaf) for leaf in leaves
        )
    return chains


def port_chain(protocol: Protocol, port: int) -> str:
    """The first of the chains that have this port."""
    return f"{FORWARDS}-{protocol}{port >> 8:02x}"


def _ports(at: At, bits: int) -> str:
    return _span(at.protocol, at.port >> bits << bits, bits)


def _span(protocol: str, first: int, bits: int) -> str:
    return f"-p {protocol} -m {protocol} --dport {first}:{first + (1 << bits) - 1}"


@lru_cache(maxsize=1 << 14)
def _forward(at: At, target: Target) -> Rule:
    return rule(
        f"-d {at.address}/32 -p {at.protocol} -m {at.protocol} --dport {at.port}",
        to=f"DNAT --to-destination {target.address}:{target.port}",
    )


def static_nat(settings: EnforcerSettings, containers: str) -> Chains:
    """The nat chains that do not depend on containers; `containers` is the set of this cell's containers' addresses.

    What a container sends off the overlay gets the cell's address, but for the range that knows containers' own. One
    rule for all of them, since the set says who they are.
    """
    unchanged = settings.no_masquerade or settings.overlay_network
    return {
        ChainId("nat", "PREROUTING"): (rule(to=NAT.name),),
        ChainId("nat", "POSTROUTING"): (rule(f"-m set --match-set {containers} src", to="sb-masquerade"),),
        ChainId("nat", "sb-masquerade"): (
            rule(to_link(settings.vtep_name), to="RETURN"),
            rule(to_link(f"{settings.link_prefix}+"), to="RETURN"),
            rule(TO_GUEST, to="RETURN"),
            rule(f"-d {unchanged}", to="RETURN"),
            rule(to="MASQUERADE"),
        ),
    }
