"""Chains for what containers send off the overlay: to anything that is neither a container's link nor the VTEP.

    sb-out      (a new flow from a container) the overlay; deny networks; then by the source's address
    sb-from     to the chain of its /28
    sb-f-/28    to the chain of what the container may reach, past the limit of its connection rate
    sb-e-REACH  one for each distinct combination of deny networks and lists of rules
    sb-s-LIST   one for each distinct list of rules

What no rule accepts comes back to `sb-out`, and is refused there (`sb-deny-out`). The order is the original's
(contract/cell.md 2.4 d), except that a denied network is refused before the rate is looked at, and that lists that log
come first. The original asks only about packets that leave by an underlay interface; here it is all that are not for
containers, so that an interface nobody thought of is no way out.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network

from bus.messages import Workload
from bus.security_groups import AddressRange, EgressProtocol, EgressRule
from services.enforcer.groups import Reach, RuleList
from services.enforcer.logged import DENY_OUT, Verdict, Why, allowed, refused
from services.enforcer.rules import NEW, REJECT, ChainId, Chains, Rule, Rules, rule
from services.enforcer.settings import EnforcerSettings
from services.enforcer.tree import group_of

FROM = ChainId("filter", "sb-from")
REFUSE_RATE = "sb-deny-rate"
"""Refuses connections that are too many a second; in a dry run it lets them go on."""
LET_OUT = "sb-let-out"
"""Accepts a flow that is to be logged."""
DENIED = "sb-deny-always"
SHARED = ("sb-e", "sb-f", "sb-s")
"""What the names of all chains begin with that depend on what containers may reach."""

_DENIED_OF = {Workload.APP: "sb-deny-running", Workload.STAGING: "sb-deny-staging"}
_EVERYWHERE = AddressRange.parse("0.0.0.0/0")
_MULTIPORT = 15
"""Ports that one multiport match takes; a range counts as two (iptables-extensions(8))."""
_HASHLIMIT_BUCKETS = 1024
_HASHLIMIT_ENTRIES = 65536


def static_egress(settings: EnforcerSettings) -> Chains:
    """The chains that do not depend on containers: networks denied to all, to apps and tasks, and to staging."""

    def denying(networks: Sequence[IPv4Network]) -> Rules:
        return tuple(rule(f"-d {network}", to=DENY_OUT) for network in networks)

    return {
        ChainId("filter", DENIED): denying(settings.denied_always),
        ChainId("filter", _DENIED_OF[Workload.APP]): denying(settings.denied_running),
        ChainId("filter", _DENIED_OF[Workload.STAGING]): denying(settings.denied_staging),
        ChainId("filter", LET_OUT): (*allowed(settings, Why.GROUP, by="srcip"), rule(to="ACCEPT")),
        ChainId("filter", REFUSE_RATE): (
            (refused(settings, Why.RATE, Verdict.DRY, by="srcip"),)
            if settings.outbound_dry_run
            else (refused(settings, Why.RATE, by="srcip"), rule(to=REJECT))
        ),
    }


def egress_chains(settings: EnforcerSettings, reaches: Mapping[IPv4Address, Reach]) -> dict[ChainId, Rules]:
    """All chains that depend on what these containers may reach."""
    chains: dict[ChainId, Rules] = {}
    leaves: defaultdict[IPv4Network, list[Rule]] = defaultdict(list)
    names: dict[int, str] = {}  # by identity: mostly a few objects for all, and their hash goes through all lists
    for address in sorted(reaches, key=int):
        reach = reaches[address]
        if not reach:
            continue
        name = names.get(id(reach))
        if name is None:
            name = names[id(reach)] = reach_chain(reach)
            chains[ChainId("filter", name)] = _combination(reach)
            for each in reach.lists:
                chains[ChainId("filter", list_chain(each))] = list_rules(each, log_all=settings.log_security_groups)
        leaf = leaves[group_of(address)]
        if settings.limits_outbound:
            leaf.append(_limit(address, settings.outbound_rate, settings.outbound_burst))
        leaf.append(_from(address, name))
    chains |= {ChainId("filter", source_chain(group)): tuple(rules) for group, rules in leaves.items()}
    chains[FROM] = tuple(rule(f"-s {group}", to=source_chain(group)) for group in leaves)
    return chains


def source_chain(group: IPv4Network) -> str:
    return f"sb-f-{int(group.network_address):08x}"


def list_chain(rules: RuleList) -> str:
    return f"sb-s-{rules.digest}"


@lru_cache(maxsize=1 << 12)
def reach_chain(reach: Reach) -> str:
    content = [str(reach.denied), *(each.digest for each in reach.lists)]
    return f"sb-e-{blake2b(' '.join(content).encode(), digest_size=8).hexdigest()}"


@lru_cache(maxsize=1 << 12)
def _combination(reach: Reach) -> Rules:
    denied = () if reach.denied not in _DENIED_OF else (rule(to=_DENIED_OF[reach.denied]),)
    return (*denied, *(rule(to=list_chain(each)) for each in reach.lists))


@lru_cache(maxsize=1 << 12)
def _from(address: IPv4Address, chain: str) -> Rule:
    return rule(f"-s {address}/32", to=chain)


@lru_cache(maxsize=1 << 12)
def _limit(address: IPv4Address, rate: int, burst: int) -> Rule:
    """One container's new TCP connections to one address and port.

    Each container has a table of its own, since the kernel drops what finds a table full: nobody shall fill another's.
    The limits are in its name, because a table keeps those it was made with.
    """
    expire = math.ceil(burst / rate) * 1000
    return rule(
        f"-s {address}/32 -p tcp {NEW}",
        f"-m hashlimit --hashlimit-above {rate}/sec --hashlimit-burst {burst} --hashlimit-mode dstip,dstport",
        f"--hashlimit-name sb-{int(address):08x}-{rate}-{burst} --hashlimit-htable-size {_HASHLIMIT_BUCKETS}",
        f"--hashlimit-htable-max {_HASHLIMIT_ENTRIES} --hashlimit-htable-expire {expire}",
        to=REFUSE_RATE,
    )


@lru_cache(maxsize=1 << 10)
def list_rules(rules: RuleList, *, log_all: bool = False) -> Rules:
    """The rules of one list, each once.

    A rule is one for each destination, and for each 15 ports; ICMP without a type is any, with a type alone any code.
    """
    return tuple(dict.fromkeys(made for each in rules.rules for made in _rules(each, log_all)))


def _rules(egress: EgressRule, log_all: bool) -> Iterator[Rule]:
    target = LET_OUT if egress.log or log_all else "ACCEPT"
    for destination in egress.destinations:
        for match in _matches(egress):
            yield rule(*filter(None, (_to(destination), match)), to=target)


def _to(destination: AddressRange) -> str:
    text = str(destination)
    if destination == _EVERYWHERE:
        return ""
    return f"-m iprange --dst-range {text}" if "-" in text else f"-d {text}"


def _matches(egress: EgressRule) -> list[str]:
    """A rule's protocol and ports, types and codes, in as few matches as can be."""
    protocol = egress.protocol
    if protocol is EgressProtocol.ALL:
        return [""]
    if protocol is EgressProtocol.ICMP:
        if egress.icmp_type is None:
            return ["-p icmp"]
        code = "" if egress.icmp_code is None else f"/{egress.icmp_code}"
        return [f"-p icmp -m icmp --icmp-type {egress.icmp_type}{code}"]
    if (1, 65535) in egress.ports:
        return [f"-p {protocol}"]
    bundles: list[list[str]] = []
    room = 0
    for start, end in dict.fromkeys(egress.ports):
        size = 1 if start == end else 2
        if size > room:
            bundles.append([])
            room = _MULTIPORT
        bundles[-1].append(str(start) if start == end else f"{start}:{end}")
        room -= size
    return [
        f"-p {protocol} -m {protocol} --dport {bundle[0]}"
        if len(bundle) == 1
        else f"-p {protocol} -m multiport --dports {','.join(bundle)}"
        for bundle in bundles
    ]
