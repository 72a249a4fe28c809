"""Open flows against policies: one that no policy allows any more is marked dead, one that is allowed again revived.

A rule then refuses what is marked. Deleting the entry instead would not cut a flow across cells: the next packet makes
a new one, and the far cell still says established (kernel.md 2).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.enforcer.conntrack import Conntrack, Flow
from services.enforcer.desired import FlowCheck, allows
from services.enforcer.rules import DEAD, TAG_MASK

MAX_LOOKUPS = 8
"""From so many filtered dumps on, one of the whole table is cheaper."""


@dataclass(frozen=True, slots=True)
class Swept:
    cut: int = 0
    revived: int = 0


def sweep(conntrack: Conntrack, checks: Sequence[FlowCheck]) -> Swept:
    """Hold the flows that the checks name against their sources. Raises OSError."""
    cut = revived = 0
    for flow, check in _concerned(conntrack, checks):
        tag = flow.mark & TAG_MASK
        # Without a tag it was not a policy that let it in: the host's own connection to a container.
        if tag == 0:
            continue
        allowed = allows(check.sources, tag, flow.protocol, flow.port)
        dead = bool(flow.mark & DEAD)
        if dead and allowed:
            revived += conntrack.mark(flow, 0, DEAD)
        elif not dead and not allowed:
            cut += conntrack.mark(flow, DEAD, DEAD)
    return Swept(cut, revived)


def _concerned(conntrack: Conntrack, checks: Sequence[FlowCheck]) -> Iterable[tuple[Flow, FlowCheck]]:
    lookups = [(check, tag) for check in checks for tag in (check.tags if check.tags is not None else (None,))]
    if len(lookups) <= MAX_LOOKUPS:
        return [(flow, check) for check, tag in lookups for flow in conntrack.flows_to(check.address, tag)]
    by_address = {check.address: check for check in checks}
    return [
        (flow, by_address[flow.destination])
        for flow in conntrack.flows()
        if flow.mark & TAG_MASK and flow.destination in by_address
    ]
