"""Open flows against policies: one that no policy allows any more is marked dead, one that is allowed again revived.

A rule then refuses what is marked. Deleting the entry instead would not cut a flow across cells: the next packet makes
a new one, and the far cell still says established (kernel.md 2).

A look-up walks the kernel's whole table (9 ms for 262 144 empty buckets), so there is none where nothing can come of
it: for a policy that only grew, unless flows are known to be dead that it may revive.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from services.enforcer.conntrack import Conntrack, Flow
from services.enforcer.desired import FlowCheck, allows
from services.enforcer.rules import DEAD, TAG_MASK

MAX_LOOKUPS = 4
"""From so many filtered dumps on, one of the whole table is cheaper."""


@dataclass(frozen=True, slots=True)
class Swept:
    cut: int = 0
    revived: int = 0


class Flows:
    """The flows to this cell's containers. Made in the kernel thread, for it alone."""

    def __init__(self) -> None:
        self._conntrack = Conntrack()
        self._dead: set[tuple[IPv4Address, int]] = set()

    def sweep(self, checks: Sequence[FlowCheck]) -> Swept:
        """Hold the flows that the checks name against their sources. Raises OSError."""
        by_address = {check.address: check for check in checks}
        lookups: list[tuple[IPv4Address, int | None]] = []
        cuts = False
        for check in checks:
            if check.lost is None:
                lookups.append((check.address, None))
                cuts = True
            else:
                revivable = {tag for tag in check.gained if (check.address, tag) in self._dead}
                lookups += [(check.address, tag) for tag in check.lost | revivable]
                cuts = cuts or bool(check.lost)
        cut = revived = 0
        # Twice: the first time some flow may just be on its way in, by the rules that were.
        for _ in range(2 if cuts else 1 if lookups else 0):
            for flow in list(self._find(lookups)):
                verdict = self._judge(flow, by_address[flow.destination])
                cut += verdict == "cut"
                revived += verdict == "revived"
        return Swept(cut, revived)

    def forget(self, addresses: Collection[IPv4Address]) -> int:
        """Delete every entry from, to, or answered by one of these addresses; how many there were."""
        self._dead = {pair for pair in self._dead if pair[0] not in addresses}
        return self._conntrack.forget(addresses) if addresses else 0

    def forget_strangers(self, subnets: Collection[IPv4Network], known: Collection[IPv4Address]) -> int:
        """Delete tagged flows to addresses of these subnets that no container has; how many there were.

        Their containers went while nobody watched; the address's next container must not inherit them.
        """
        strangers = [
            flow
            for flow in self._conntrack.flows()
            if flow.destination not in known and any(flow.destination in subnet for subnet in subnets)
        ]
        return sum(self._conntrack.delete(flow) for flow in strangers)

    def _judge(self, flow: Flow, check: FlowCheck) -> str | None:
        tag = flow.mark & TAG_MASK
        # Without a tag it was not a policy that let it in: the host's own connection to a container.
        if tag == 0:
            return None
        allowed = allows(check.sources, tag, flow.protocol, flow.port)
        dead = bool(flow.mark & DEAD)
        if not allowed:
            self._dead.add((flow.destination, tag))
            return "cut" if not dead and self._conntrack.mark(flow, DEAD, DEAD) else None
        return "revived" if dead and self._conntrack.mark(flow, 0, DEAD) else None

    def _find(self, lookups: Sequence[tuple[IPv4Address, int | None]]) -> Iterator[Flow]:
        if len(lookups) <= MAX_LOOKUPS:
            for address, tag in lookups:
                yield from self._conntrack.flows_to(address, tag)
            return
        wanted = set(lookups)
        tags = {tag for _, tag in lookups}
        only = next(iter(tags)) if len(tags) == 1 else None
        for flow in self._conntrack.flows(only):
            if (flow.destination, None) in wanted or (flow.destination, flow.mark & TAG_MASK) in wanted:
                yield flow
