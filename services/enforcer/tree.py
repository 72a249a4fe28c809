"""How long chains are split, so that what a new flow costs does not grow with the number of policies.

A chain is walked rule by rule. The chain of an app with many sources is therefore split by the source's tag, four bits
a level, lowest first (tags are given in sequence, so these spread best): no level up to 64 sources, one (16 branches)
to 1 024, two (256) beyond. Splitting sooner would triple the table, and with it what a change costs (kernel.md 4).
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network

from bus.messages import Ports, Tag
from services.enforcer.rules import ChainId, Rule, Rules, rule, tagged, to_ports

ACCEPT_FLOW = "sb-accept"
"""The chain that remembers the source's tag in the connection's mark and accepts."""

GROUP = 28
"""Containers are told apart by address in two steps: the /28, then within it."""

Sources = Mapping[Tag, tuple[Ports, ...]]
"""Who may open connections: the source's tag -> where to."""


@lru_cache(maxsize=1 << 12)
def group_of(address: IPv4Address) -> IPv4Network:
    """The /28 of a container."""
    return IPv4Network((address, GROUP), strict=False)


def levels(sources: int) -> int:
    """How many levels of 16 branches the chain of an app with so many sources has."""
    return 0 if sources <= 64 else 1 if sources <= 1024 else 2


@lru_cache(maxsize=1 << 17)
def allowing(tag: Tag, ports: Ports) -> Rule:
    """The rule for one policy. Cached: an app's chain is rendered whole whenever one of its policies changes."""
    protocol, _, rest = to_ports(ports).partition(" -m ")
    return rule(protocol, tagged(tag), f"-m {rest}", to=ACCEPT_FLOW)


def app_chains(name: str, sources: Sources) -> dict[ChainId, Rules]:
    """The chains of one app, the first of which is `name`: filter chains that accept what `sources` allow."""
    return _split(name, sources, levels(len(sources)), shift=0)


def _split(name: str, sources: Sources, depth: int, shift: int) -> dict[ChainId, Rules]:
    if depth == 0:
        leaf = tuple(allowing(tag, ports) for tag in sorted(sources) for ports in sources[tag])
        return {ChainId("filter", name): leaf}
    branches: defaultdict[int, dict[Tag, tuple[Ports, ...]]] = defaultdict(dict)
    for tag, ports in sources.items():
        branches[tag >> shift & 0xF][tag] = ports
    # The first split adds "-", further ones only their digit: "sb-a-…", "sb-a-…-3", "sb-a-…-3f".
    names = {digit: f"{name}{'' if shift else '-'}{digit:x}" for digit in sorted(branches)}
    chains = {
        ChainId("filter", name): tuple(
            rule(tagged(digit << shift, 0xF << shift), to=branch) for digit, branch in names.items()
        )
    }
    for digit, branch in names.items():
        chains |= _split(branch, branches[digit], depth - 1, shift + 4)
    return chains
