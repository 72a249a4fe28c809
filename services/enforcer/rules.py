"""Rules as data: what the kernel shall hold, rendered to iptables-restore text.

A chain is named by its table and its name; ours begin with `sb-`. A built-in chain (FORWARD, say) stands for the rules
of ours that must come first in it. Each rule carries a hash of its own intended text as a comment, so that reading
back compares hashes and never has to understand what another version of iptables prints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from bus.messages import Ports, Tag

PREFIX = "sb-"
TAG_MASK = 0xFFFF
"""The bits of a packet's or connection's mark that are the source's tag; GBP lets others through (kernel.md 1)."""
LET_IN = 0x80000
"""The bit of a packet's mark that says to the next cell: this answers a flow that a policy let in here. It is the one
that VXLAN-GBP carries as "policy applied" (draft-smith-vxlan-group-policy, flag A)."""
DEAD = 0x80000000
"""The bit of a connection's mark that says: no policy allows this flow any more."""
GUESTS = 0x7362
"""The device group (ip-link(8)) of containers' links that another CNI plugin made, whatever their names are."""
TABLES = ("raw", "mangle", "nat", "filter")
"""In the order in which a packet meets them."""


class ChainId(NamedTuple):
    table: str
    name: str

    @property
    def ours(self) -> bool:
        return self.name.startswith(PREFIX)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its matches as iptables-restore text, its target with the target's options, and their hash."""

    match: str
    target: str
    hash: str

    @property
    def specification(self) -> str:
        """The rule as it follows `-A CHAIN`. The comment stands last: a legacy table then tests it only on a match."""
        return f"{self.match} -m comment --comment sb:{self.hash} -j {self.target}".lstrip()


def rule(*match: str, to: str) -> Rule:
    """A rule that sends what meets all of `match` to the target or chain `to`."""
    text = " ".join(match)
    return Rule(text, to, blake2b(f"{text} -j {to}".encode(), digest_size=6).hexdigest())


Rules = tuple[Rule, ...]
Chains = Mapping[ChainId, Rules]


def from_link(name: str) -> str:
    return f"-i {name}"


def to_link(name: str) -> str:
    return f"-o {name}"


FROM_GUEST = f"-m devgroup --src-group {GUESTS:#x}"
TO_GUEST = f"-m devgroup --dst-group {GUESTS:#x}"
NOT_FROM_GUEST = f"-m devgroup ! --src-group {GUESTS:#x}"


def tagged(tag: Tag | int, mask: int = TAG_MASK) -> str:
    """Packets whose mark has these bits under the mask."""
    return f"-m mark --mark {tag:#x}/{mask:#x}"


def to_ports(ports: Ports) -> str:
    span = str(ports.start) if ports.start == ports.end else f"{ports.start}:{ports.end}"
    return f"-p {ports.protocol} -m {ports.protocol} --dport {span}"


TAGGED = f"-m mark ! --mark 0x0/{TAG_MASK:#x}"
REVOKED = f"-m connmark --mark {DEAD:#x}/{DEAD:#x}"
ESTABLISHED = "-m conntrack --ctstate RELATED,ESTABLISHED"
NEW = "-m conntrack --ctstate NEW"
FLOW_TAGGED = f"-m connmark ! --mark 0x0/{TAG_MASK:#x}"
"""Flows that a policy let in to a container of this cell."""
FLOW_UNTAGGED = f"-m connmark --mark 0x0/{TAG_MASK:#x}"
FROM_OPENER = f"{ESTABLISHED} --ctdir ORIGINAL"
ANSWER = f"{ESTABLISHED} --ctdir REPLY"
"""With ICMP errors, which carry what their sender likes and belong to whatever flow they quote."""
UNPROVEN = f"-m mark ! --mark {LET_IN:#x}/{LET_IN:#x}"
PROVE = f"MARK --set-xmark {LET_IN:#x}/{LET_IN:#x}"
COMPARE_TAG = f"CONNMARK --restore-mark --nfmask 0x0 --ctmask {TAG_MASK:#x}"
"""With no bits of the packet's mark cleared first this is an exclusive or: it leaves a tag of 0 if the packet's and the
flow's are the same, and done again it gives the packet's own tag back (xt_connmark)."""
TRANSLATED = "-m conntrack --ctstate DNAT"
REJECT = "REJECT --reject-with icmp-port-unreachable"
RESET = "REJECT --reject-with tcp-reset"
