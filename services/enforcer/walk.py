"""Follows the first packet of a flow through chains as the kernel would, to say which rule decides.

It reads the rules that are to be in the kernel, not what the kernel prints: the words are our own, and few. A word that
is not known ends the walk (`CannotFollow`), rather than guessing. Rates are taken as not exceeded, and only what a
packet of a new flow, from its true source, can meet is followed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from services.enforcer.egress import LET_OUT, REFUSE_RATE
from services.enforcer.logged import DENY_IN, DENY_OUT
from services.enforcer.rules import ChainId, Chains, Rule
from services.enforcer.tree import ACCEPT_FLOW

MAX_DEPTH = 16
DECIDED = (ACCEPT_FLOW, LET_OUT, DENY_IN, DENY_OUT, REFUSE_RATE)
"""Chains in which nothing is asked any more."""


class CannotFollow(Exception):
    """A rule that this does not understand. The text has it."""


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a flow where it is forwarded, or comes in: then it has no link to leave by.

    `by` is the link that it came by, `out` the one it leaves by, with their device groups; `icmp` is type and code.
    """

    source: IPv4Address
    destination: IPv4Address
    protocol: str
    port: int = 0
    by: str = ""
    out: str = ""
    mark: int = 0
    icmp: tuple[int, int] | None = None
    by_group: int = 0
    out_group: int = 0
    states: frozenset[str] = frozenset({"NEW"})


@dataclass(slots=True)
class Walk:
    """Where a packet got to: through which chains, and what decided.

    `target` is ACCEPT, REJECT or DROP, or empty for a packet that left our chains undecided. `rule`, of `chain`, is the
    one that decided, or that sent it to a chain where everything is decided alike (one that logs and refuses, say).
    """

    packet: Packet
    visited: list[ChainId] = field(default_factory=list)
    target: str = ""
    chain: ChainId | None = None
    rule: Rule | None = None


Sets = Mapping[str, Collection[IPv4Address]]


def walk(chains: Chains, table: str, start: str, packet: Packet, sets: Sets) -> Walk:
    """Follow a packet from a built-in chain. Raises CannotFollow."""
    made = Walk(packet)
    _through(chains, ChainId(table, start), made, sets, [])
    return made


def _through(chains: Chains, chain: ChainId, made: Walk, sets: Sets, jumps: list[tuple[ChainId, Rule]]) -> bool:
    """Whether the packet was decided in this chain or those it leads to."""
    if len(jumps) > MAX_DEPTH:
        raise CannotFollow(f"chain {chain.name}: more than {MAX_DEPTH} chains deep")
    if chain not in made.visited:
        made.visited.append(chain)
    for rule in chains.get(chain, ()):
        if not matches(rule.match, made.packet, sets):
            continue
        target = rule.target.split()[0]
        if target in ("NFLOG", "CONNMARK", "CT"):
            continue
        if target == "RETURN":
            return False
        if target in ("ACCEPT", "DROP", "REJECT"):
            path = [*jumps, (chain, rule)]
            made.target = target
            made.chain, made.rule = next(step for step in reversed(path) if step[0].name not in DECIDED)
            return True
        following = ChainId(chain.table, target)
        if following not in chains:
            raise CannotFollow(f"chain {chain.name}: {rule.match} -j {rule.target}")
        if _through(chains, following, made, sets, [*jumps, (chain, rule)]):
            return True
    return False


def matches(match: str, packet: Packet, sets: Sets) -> bool:
    """Whether a rule's matches, as iptables-restore has them, take the packet. Raises CannotFollow."""
    return all(_check(*test, packet, sets, match) for test in _tests(match))


def _tests(match: str) -> Iterator[tuple[str, str, list[str], bool]]:
    """Each single test in a rule: its module, its option with its arguments, and whether it is inverted."""
    words = match.split()
    module, inverted, position = "", False, 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "!":
            inverted = True
        elif word == "-m":
            module = words[position]
            position += 1
        else:
            count = _ARGUMENTS.get(word, 1)
            yield module, word, words[position : position + count], inverted
            position += count
            inverted = False


_ARGUMENTS = {"--syn": 0, "--invert": 0, "--match-set": 2}


def _check(module: str, option: str, values: list[str], inverted: bool, packet: Packet, sets: Sets, match: str) -> bool:
    test = _TESTS.get((module, option)) or _TESTS.get(("", option))
    if test is None:
        raise CannotFollow(f"{option} in: {match}")
    return test(values, packet, sets) != inverted


def _link(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("+") else name == pattern


def _masked(text: str, value: int) -> bool:
    wanted, _, mask = text.partition("/")
    return value & (int(mask, 0) if mask else 0xFFFFFFFF) == int(wanted, 0)


def _in_ports(text: str, port: int) -> bool:
    return any(
        int(start) <= port <= int(end or start) for start, _, end in (item.partition(":") for item in text.split(","))
    )


def _in_range(text: str, address: IPv4Address) -> bool:
    first, _, last = text.partition("-")
    return IPv4Address(first) <= address <= IPv4Address(last)


def _icmp(text: str, sent: tuple[int, int] | None) -> bool:
    kind, _, code = text.partition("/")
    return sent is not None and sent[0] == int(kind) and (not code or sent[1] == int(code))


def _in_set(values: list[str], packet: Packet, sets: Sets) -> bool:
    name, side = values
    if name not in sets:
        raise CannotFollow(f"set {name}")
    return (packet.source if side == "src" else packet.destination) in sets[name]


_Test = Callable[[list[str], Packet, Sets], bool]
_TESTS: Mapping[tuple[str, str], _Test] = {
    ("", "-i"): lambda v, p, _: _link(v[0], p.by),
    ("", "-o"): lambda v, p, _: bool(p.out) and _link(v[0], p.out),
    ("", "-s"): lambda v, p, _: p.source in IPv4Network(v[0]),
    ("", "-d"): lambda v, p, _: p.destination in IPv4Network(v[0]),
    ("", "-p"): lambda v, p, _: v[0] in ("all", p.protocol),
    ("", "--dport"): lambda v, p, _: _in_ports(v[0], p.port),
    ("multiport", "--dports"): lambda v, p, _: _in_ports(v[0], p.port),
    ("tcp", "--syn"): lambda _, p, __: p.protocol == "tcp",
    ("mark", "--mark"): lambda v, p, _: _masked(v[0], p.mark),
    # A new flow's connection has no mark yet.
    ("connmark", "--mark"): lambda v, _, __: _masked(v[0], 0),
    ("conntrack", "--ctstate"): lambda v, p, _: bool(p.states & set(v[0].split(","))),
    ("conntrack", "--ctdir"): lambda v, _, __: v[0] == "ORIGINAL",
    ("iprange", "--dst-range"): lambda v, p, _: _in_range(v[0], p.destination),
    ("iprange", "--src-range"): lambda v, p, _: _in_range(v[0], p.source),
    ("icmp", "--icmp-type"): lambda v, p, _: _icmp(v[0], p.icmp),
    ("devgroup", "--src-group"): lambda v, p, _: p.by_group == int(v[0], 0),
    ("devgroup", "--dst-group"): lambda v, p, _: bool(p.out) and p.out_group == int(v[0], 0),
    ("set", "--match-set"): _in_set,
    # Not exceeded.
    ("hashlimit", "--hashlimit-above"): lambda _, __, ___: False,
    ("hashlimit", "--hashlimit-upto"): lambda _, __, ___: True,
    **{
        ("hashlimit", f"--hashlimit-{option}"): lambda _, __, ___: True
        for option in ("burst", "mode", "name", "htable-size", "htable-max", "htable-expire")
    },
}
