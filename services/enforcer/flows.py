"""Open flows against policies: one that no policy allows any more is marked dead, one that is allowed again revived.

A rule then refuses what is marked. Deleting the entry instead would not cut a flow across cells: the next packet makes
a new one, and the far cell still says established (kernel.md 2). Peers that only wait are told by ending their sockets.

Only flows that a policy let in are judged, which their tag says: what a container opened off the overlay, and what came
to it through a forwarded port, no policy of ours has taken back.

A look-up walks the kernel's whole table (9 ms for 262 144 empty buckets), so there is none where nothing can come of
it: for a policy that only grew, unless flows are known to be dead that it may revive.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from services.enforcer.conntrack import Conntrack, Flow
from services.enforcer.desired import FlowCheck, allows
from services.enforcer.rules import DEAD, TAG_MASK
from services.enforcer.sockets import Sockets
from services.enforcer.tree import Sources

ENTRIES_A_LOOKUP = 850
"""So many entries take as long to look at, all of them, as one filtered look-up takes."""


@dataclass(frozen=True, slots=True)
class Swept:
    cut: int = 0
    revived: int = 0


Lookup = tuple[IPv4Address, int | None]
"""Flows to this address, with this tag or (None) with any."""


class Flows:
    """The flows to this cell's containers. Made in the kernel thread, for it alone."""

    def __init__(self) -> None:
        self._conntrack = Conntrack()
        self._dead: set[tuple[IPv4Address, int]] = set()
        self._late: dict[IPv4Address, tuple[Sources, set[int | None]]] = {}

    def sweep(self, checks: Sequence[FlowCheck], namespaces: Mapping[IPv4Address, str]) -> Swept:
        """Hold the flows that the checks name against their sources. Raises OSError.

        `namespaces`: where the network namespaces of this cell's containers are, by address.
        """
        sources = {check.address: check.sources for check in checks}
        lookups: list[Lookup] = []
        for check in checks:
            lost: set[int | None] = {None} if check.lost is None else set(check.lost)
            revivable = {tag for tag in check.gained if (check.address, tag) in self._dead}
            lookups += [(check.address, tag) for tag in lost | revivable]
            earlier = self._late[check.address][1] if check.address in self._late else set()
            if lost or earlier:
                # With the sources of now: what was allowed again since is not to be cut.
                self._late[check.address] = check.sources, lost | earlier
        return self._look(lookups, sources, namespaces)

    @property
    def late(self) -> bool:
        """Whether a second look is due."""
        return bool(self._late)

    def sweep_late(self, namespaces: Mapping[IPv4Address, str]) -> Swept:
        """Look once more at what lost something: some flow may just have been on its way in, by the rules that were.

        For all changes since the last time at once, some time after them. Raises OSError.
        """
        late, self._late = self._late, {}
        lookups = [(address, tag) for address, (_, tags) in late.items() for tag in tags]
        try:
            return self._look(lookups, {address: sources for address, (sources, _) in late.items()}, namespaces)
        except OSError:
            self._late = late
            raise

    def recount(self) -> None:
        """Forget the dead flows that the kernel has forgotten."""
        if self._dead:
            self._dead = {(flow.destination, flow.mark & TAG_MASK) for flow in self._conntrack.marked(DEAD)}

    def forget(self, addresses: Collection[IPv4Address]) -> int:
        """Delete every entry from or to one of these addresses; how many there were."""
        self._dead = {pair for pair in self._dead if pair[0] not in addresses}
        for address in addresses:
            self._late.pop(address, None)
        return self._conntrack.forget(addresses) if addresses else 0

    def forget_strangers(self, subnets: Collection[IPv4Network], known: Collection[IPv4Address]) -> int:
        """Delete the flows of addresses of these subnets that no container has; how many there were.

        Their containers went while nobody watched; the address's next container must not inherit them. The first
        address of a subnet is its cell's own.
        """

        def is_stranger(address: IPv4Address) -> bool:
            return address not in known and any(
                address in subnet and address != subnet.network_address for subnet in subnets
            )

        strangers = [
            flow for flow in self._conntrack.all() if is_stranger(flow.destination) or is_stranger(flow.source)
        ]
        return sum(self._conntrack.delete(flow) for flow in strangers)

    def _look(
        self, lookups: Sequence[Lookup], sources: Mapping[IPv4Address, Sources], namespaces: Mapping[IPv4Address, str]
    ) -> Swept:
        cut = revived = 0
        with Sockets(namespaces) as sockets:
            for flow in list(self._find(lookups)):
                tag = flow.mark & TAG_MASK
                # Without a tag it was not a policy that let it in.
                if tag == 0:
                    continue
                dead = bool(flow.mark & DEAD)
                if allows(sources[flow.destination], tag, flow.protocol, flow.port):
                    revived += dead and self._conntrack.mark(flow, 0, DEAD)
                    continue
                self._dead.add((flow.destination, tag))
                if not dead:
                    if flow.protocol == "tcp":
                        sockets.end((flow.destination, flow.port), (flow.source, flow.source_port))
                    cut += self._conntrack.mark(flow, DEAD, DEAD)
        return Swept(cut, revived)

    def _find(self, lookups: Sequence[Lookup]) -> Iterator[Flow]:
        if not lookups or (count := self._conntrack.count()) == 0:
            return
        if len(lookups) <= 1 + count / ENTRIES_A_LOOKUP:
            for address, tag in lookups:
                yield from self._conntrack.flows_to(address, tag)
            return
        wanted: set[Lookup] = set(lookups)
        tags = {tag for _, tag in lookups}
        only = next(iter(tags)) if len(tags) == 1 else None
        for flow in self._conntrack.flows(only):
            if (flow.destination, None) in wanted or (flow.destination, flow.mark & TAG_MASK) in wanted:
                yield flow
