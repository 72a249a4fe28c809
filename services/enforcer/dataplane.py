"""The kernel's side of the enforcer: makes it hold what a plan says. All of this runs in the one kernel thread.

The order of an apply: sets, then rules (raw, mangle, filter), then flows. A flow is judged after the rules that would
refuse it are in force, and once more a moment later, for those that were being accepted meanwhile (kernel.md 2).
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from bus.failpoints import failpoint
from bus.log import about
from services.enforcer.desired import Plan, family_of
from services.enforcer.drift import CountingWatch, GenerationWatch, Pictures, Table, Watch
from services.enforcer.fixed import PEER_SET, TAG_SET, fence, static_v6
from services.enforcer.flows import Flows, Swept
from services.enforcer.guests import adopt
from services.enforcer.iptables import Edit, Family, Iptables, detect, difference, loaded
from services.enforcer.isolation import Isolation, Part
from services.enforcer.rules import TABLES, ChainId, Chains
from services.enforcer.sets import AddressSet
from services.enforcer.settings import EnforcerSettings, Kind

log = logging.getLogger(__name__)

_V6_TABLES = ("filter",)


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply did: how many chains and members it changed, which flows it cut, how long it took (seconds)."""

    chains: int
    members: int
    swept: Swept
    seconds: float
    refused: Mapping[Part, str]
    """What the kernel does not take, and is left out."""
    guests: Mapping[str, str | None]
    """The plan's containers of other plugins: handle -> why its link cannot be told, None if it can."""


class Dataplane:
    def __init__(self, settings: EnforcerSettings) -> None:
        self._settings = settings
        self._tags = AddressSet(TAG_SET, marks=True)
        self._peers = AddressSet(PEER_SET)
        self._unwanted: set[ChainId] = set()

    def open(self) -> Kind:
        """Find the kind, read the kernel, and put the fence where there is none; returns the kind.

        Chains that are there stay as they are, so that a restart neither opens nor cuts anything. Raises IptablesError
        or IpsetError.
        """
        wish = self._settings.iptables
        self.kind: Kind = "legacy" if wish == "legacy" else "nft" if wish == "nft" else detect()
        self._v4 = Iptables(self.kind)
        # A kernel without IPv6 has no such tables either, nor anything to refuse.
        self._v6 = Iptables(self.kind, "ip6") if Path("/proc/thread-self/net/if_inet6").exists() else None
        self._watch: Watch = GenerationWatch() if self.kind == "nft" else CountingWatch()
        self._isolation = Isolation(self._v4, self._read, lambda transactions: self._watch.wrote(transactions))
        self._flows = Flows()
        self.refresh()
        # Rules that stand without a hold on other plugins' containers were left when there was none of those, and none
        # can have been admitted since.
        guests = bool(difference(self._v4.picture, self._missing(fence(self._settings, guests=False))))
        self._write(self._missing(fence(self._settings, guests=guests)))
        return self.kind

    def _missing(self, chains: Chains) -> Chains:
        """Those of them that the kernel may lack: not those that are ours and there, whatever they hold."""
        own = self._v4.picture.own
        return {chain: rules for chain, rules in chains.items() if not chain.ours or chain not in own}

    def refresh(self) -> None:
        """Look at the kernel anew: at the sets, and at the tables unless they are known to be as noted."""
        self._tags.open()
        self._peers.open()
        if not self._watch.doubtful(self._pictures()):
            return
        self._read()

    def _read(self) -> None:
        self._watch.begin(self._tables())
        self._v4.read()
        if self._v6 is not None:
            self._v6.read(_V6_TABLES)
        self._watch.noted(self._pictures())

    def distrust(self) -> None:
        """Believe nothing that was noted of the tables: the next `refresh` reads them all."""
        self._watch.distrust()

    def doubtful(self) -> bool:
        """Whether somebody else changed rules or sets since we last looked. Cheap."""
        return self._watch.doubtful(self._pictures()) or self._tags.doubtful() or self._peers.doubtful()

    def _tables(self) -> list[Table]:
        return [("ip", table) for table in TABLES] + [("ip6", table) for table in _V6_TABLES if self._v6 is not None]

    def _pictures(self) -> Pictures:
        return {
            table: self._v6.picture if self._v6 is not None and table[0] == "ip6" else self._v4.picture
            for table in self._tables()
        }

    @property
    def rules(self) -> int:
        """How many rules of ours the kernel holds."""
        return self._v4.picture.rules + (self._v6.picture.rules if self._v6 is not None else 0)

    def apply(self, plan: Plan, namespaces: Mapping[IPv4Address, str]) -> Applied:
        """Make the kernel as planned; what is so already is not touched.

        `namespaces`: where the network namespaces of this cell's containers are, by address.
        Raises IptablesError, IpsetError or OSError; then `refresh` and apply a complete plan.
        """
        began = time.monotonic()
        guests = adopt(plan.guests, self._settings.link_prefix, self._settings.vtep_name, plan.underlay)
        members = self._apply_sets(plan)
        if plan.complete:
            self._isolation.retry()
        chains = self._write(plan.chains)
        self._note_unwanted(plan)
        swept = Swept()
        if chains or members or not plan.routine:
            swept = self._flows.sweep(plan.flows, namespaces)
            if plan.complete:
                self._flows.forget_strangers(plan.subnets, plan.tags.keys())
        if plan.complete:
            self._flows.recount()
        self._flows.forget(plan.released)
        if chains or plan.flows or plan.released:
            failpoint("enforcer.after-cut")
        return Applied(chains, members, swept, time.monotonic() - began, dict(self._isolation.refused), guests)

    def settle(self, namespaces: Mapping[IPv4Address, str]) -> Swept:
        """What is better done a moment after applies, once for several: the second look at the flows that may be cut,
        and noting the tables as we left them. Raises OSError."""
        self._watch.settle(self._tables())
        return self._flows.sweep_late(namespaces)

    def _apply_sets(self, plan: Plan) -> int:
        tags = {address: None if tag is None else int(tag) for address, tag in plan.tags.items()}
        if plan.complete:
            members = self._tags.become({address: tag for address, tag in tags.items() if tag is not None})
        else:
            members = self._tags.change(tags)
        if plan.peers is not None:
            members += self._peers.become(dict.fromkeys(plan.peers, 0))
        return members

    def _write(self, chains: Chains) -> int:
        """Write what differs; how many chains did."""
        # IPv6 has nothing that changes: it is compared whenever the fixed chains of IPv4 are.
        edit6 = Edit({}, {})
        if self._v6 is not None and any(not chain.ours for chain in chains):
            edit6 = difference(self._v6.picture, static_v6(self._settings))
        edit = self._isolation.edit(chains)
        if not edit and not edit6:
            return 0
        failpoint("enforcer.before-apply")
        changed = self._isolation.write(edit, chains)
        if edit6 and self._v6 is not None:
            self._v6.write(edit6)
            self._watch.wrote(len(edit6.lines))
        failpoint("enforcer.after-apply")
        return changed + len(edit6.chains)

    def _note_unwanted(self, plan: Plan) -> None:
        own = self._v4.picture.own
        if plan.complete:
            self._unwanted = {chain for chain in own if chain not in plan.chains}
        elif plan.families:
            self._unwanted -= plan.chains.keys()
            for chain in own:
                wanted = plan.families.get(family_of(chain.name))
                if wanted is not None and chain.name not in wanted:
                    self._unwanted.add(chain)

    def prune(self) -> int:
        """Delete chains that nothing needs any more: later, because it costs as much as an apply and nobody waits."""
        if not self._unwanted:
            return 0
        unwanted, self._unwanted = self._unwanted, set()
        self._watch.wrote(self._v4.delete(unwanted))
        return len(unwanted)

    def sweep_other_kind(self) -> None:
        """Take out what an enforcer of the other kind left. Only once our own rules are complete."""
        other: Kind = "legacy" if self.kind == "nft" else "nft"
        families: tuple[Family, ...] = ("ip", "ip6")
        for family in families:
            tables = Iptables(other, family)
            tables.read(loaded(other, family))
            if removed := tables.erase():
                log.warning("removed our rules of the other kind", extra=about(kind=other, removed=removed))
