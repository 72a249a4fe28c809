"""Why a flow passes here, or does not: by the rules that are wanted, and by whether the kernel has them.

The wanted chains are followed with the flow's first packet (`walk`), as the source's cell sees it, or the destination's
(`viewpoint`). The chains that the packet meets are then read from the kernel anew, and compared rule by rule, as is the
source's tag in the set that gives it. A change on its way to the kernel is waited for, so that what differs is somebody
else's doing.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bus.explaining import MAX_INSTANCES, CellAnswer, Instance, Probe, Question, Verdict
from bus.log import about
from bus.messages import CellName, Handle, Revision
from bus.process import KernelThread
from services.enforcer.desired import fixed_chains, plan
from services.enforcer.fixed import TAG_SET
from services.enforcer.kernel_view import CannotLook, Held, held, marks
from services.enforcer.model import Touched
from services.enforcer.probe import MAX_CONTAINERS, probe
from services.enforcer.reasons import reason
from services.enforcer.reconciler import Reconciler
from services.enforcer.rules import ChainId, Chains
from services.enforcer.settings import Kind
from services.enforcer.tree import group_of
from services.enforcer.viewpoint import CannotExplain, Flow, View, views
from services.enforcer.walk import CannotFollow, Walk, walk

log = logging.getLogger(__name__)

LOOKS = 3
"""How often the kernel is looked at before a difference is believed."""
LOOK_AGAIN = 0.2
_MARKING = (ChainId("mangle", "PREROUTING"), ChainId("mangle", "sb-mark"))
_LOCAL = 2
"""RTN_LOCAL (rtnetlink(7)): the destination is this host itself."""
_VERDICTS = {"ACCEPT": Verdict.PASSES, "REJECT": Verdict.REFUSED, "DROP": Verdict.REFUSED}


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What the kernel held at one moment."""

    chains: Held
    tags: Mapping[IPv4Address, int]

    @classmethod
    def look(cls, kind: Kind, chains: Sequence[ChainId]) -> "_Kernel":
        return cls(held(kind, chains), marks(TAG_SET))


class Explainer:
    """Answers for one cell, one question after another.

    `thread` is one in the cell's network namespace that looks at the kernel: not the one that writes rules, which
    questions shall not hold up.
    """

    def __init__(self, reconciler: Reconciler, thread: KernelThread, cell: str) -> None:
        self._reconciler = reconciler
        self._thread = thread
        self._cell = cell
        self._turn = asyncio.Lock()

    @property
    def revision(self) -> Revision:
        """Of the policies that answers are made of."""
        return self._reconciler.model.revision

    async def answer(self, question: Question) -> CellAnswer:
        """What this cell says of a flow between two apps, trying connections if there are targets."""
        flow = Flow(question.source, question.destination, str(question.protocol), question.port)
        found = await self.explain(flow, id=question.id)
        if not question.targets:
            return found
        probes = await self._probe(question, [instance.handle for instance in found.sources[:MAX_CONTAINERS]])
        sources = tuple(replace(instance, probes=probes.get(instance.handle)) for instance in found.sources)
        return replace(found, sources=sources)

    async def _probe(self, question: Question, handles: Sequence[Handle]) -> Mapping[Handle, tuple[Probe, ...]]:
        known = self._reconciler.model.containers
        containers = [known[handle] for handle in handles if handle in known]  # one may be gone by now
        found = await asyncio.gather(
            *(probe(each, question.protocol, question.port, question.targets) for each in containers)
        )
        return {container.handle: probes for container, probes in zip(containers, found, strict=True)}

    async def explain(self, flow: Flow, *, id: str = "") -> CellAnswer:  # noqa: A002 (the message's own word)
        """What this cell says of a flow. Raises CannotExplain."""
        async with self._turn:
            for look in range(1, LOOKS + 1):
                out = await self._route(flow)
                # From here to the look nothing else runs in the loop: the rules are those wanted right now.
                asked = _Asked(self._reconciler, flow, out)
                problem, kernel = await self._look(asked)
                sources, destinations = asked.said(kernel, problem)
                agree = all(instance.kernel_agrees is not False for instance in (*sources, *destinations))
                if agree or look == LOOKS:
                    break
                await asyncio.sleep(LOOK_AGAIN)
        return CellAnswer(id, CellName(self._cell), asked.revision, tuple(sources), tuple(destinations), problem)

    async def _look(self, asked: "_Asked") -> tuple[str, _Kernel | None]:
        """What the kernel has of the chains concerned, or why that is not known."""
        if self._reconciler.applied_at is None:
            return f"nothing is enforced yet but the fence: {self._reconciler.problem}"[:900], None
        if not asked.views:
            return "", None
        try:
            return "", await self._thread.run(_Kernel.look, self._reconciler.kind, asked.visited)
        except CannotLook as error:
            log.warning("the kernel cannot be looked at", extra=about(error=str(error)))
            return f"the kernel cannot be looked at: {error}"[:900], None

    async def _route(self, flow: Flow) -> str | None:
        """By which link this host sends to the flow's destination if that is off the overlay; "" to itself."""
        if not isinstance(flow.destination, IPv4Address):
            return None
        if self._reconciler.settings.on_overlay(flow.destination):
            return None
        return await self._thread.run(_route_to, flow.destination)


def _route_to(address: IPv4Address) -> str:
    with IPRoute() as ip:
        try:
            (route,) = ip.route("get", dst=str(address))
        except NetlinkError as error:
            raise CannotExplain(f"destination: this host has no route to {address}: {error}") from None
        if route["type"] == _LOCAL:
            return ""
        (link,) = ip.get_links(route.get_attr("RTA_OIF"))
        return str(link.get_attr("IFLA_IFNAME"))


class _Asked:
    """One question at one moment: the containers concerned, the packets, where the wanted chains take them."""

    def __init__(self, reconciler: Reconciler, flow: Flow, out: str | None) -> None:
        self._settings, self._model = reconciler.settings, reconciler.model
        self.revision = self._model.revision
        self.views = views(self._settings, self._model, flow, out)[:MAX_INSTANCES]
        self._chains = self._wanted(egress=out is not None) if self.views else {}
        self._walks = [self._walk(view) for view in self.views]

    def _wanted(self, *, egress: bool) -> Chains:
        """The chains that the packets may meet: the fixed ones, and those of the containers concerned."""
        touched = Touched(egress=egress)
        for view in self.views:
            to = self._model.container_at(view.packet.destination)
            if to is not None:
                touched.groups.add(group_of(view.packet.destination))
                if to.app is not None:
                    touched.apps[to.app] = {}
        return {**fixed_chains(self._settings, self._model), **plan(self._settings, self._model, touched).chains}

    def _walk(self, view: View) -> Walk | CannotFollow:
        try:
            return walk(self._chains, "filter", view.chain, view.packet, {TAG_SET: self._model.addresses()})
        except CannotFollow as error:
            return error

    @property
    def visited(self) -> list[ChainId]:
        """The chains that the packets meet."""
        pairs = zip(self.views, self._walks, strict=True)
        return sorted({chain for view, made in pairs if isinstance(made, Walk) for chain in self._met(view, made)})

    def _met(self, view: View, made: Walk) -> list[ChainId]:
        """The chains that one packet meets: also those where a container's gets its tag."""
        return [*made.visited, *(_MARKING if view.outgoing else ())]

    def said(self, kernel: _Kernel | None, problem: str) -> tuple[list[Instance], list[Instance]]:
        """The instances as sources and as destinations. Without `kernel` there is a `problem`."""
        sources: list[Instance] = []
        destinations: list[Instance] = []
        for view, made in zip(self.views, self._walks, strict=True):
            (sources if view.outgoing else destinations).append(self._instance(view, made, kernel, problem))
        return sources, destinations

    def _instance(self, view: View, made: Walk | CannotFollow, kernel: _Kernel | None, problem: str) -> Instance:
        handle = view.container.handle
        if isinstance(made, CannotFollow):
            return Instance(handle, view.address, Verdict.UNKNOWN, f"a rule that cannot be followed: {made}"[:900])
        verdict = _VERDICTS.get(made.target, Verdict.UNKNOWN)
        differences = (problem,) if kernel is None else tuple(self._differences(view, made, kernel))
        return Instance(
            handle,
            view.address,
            verdict,
            reason(self._settings, self._model, view, made, verdict),
            "" if made.chain is None else made.chain.name,
            "" if made.rule is None else f"{made.rule.match} -j {made.rule.target}".lstrip(),
            None if kernel is None else not differences,
            differences,
        )

    def _differences(self, view: View, made: Walk, kernel: _Kernel) -> list[str]:
        found = []
        for chain in self._met(view, made):
            wanted = [rule.hash for rule in self._chains[chain]]
            rules = kernel.chains.get(chain)
            if rules is None:
                found.append(f"{chain.table} {chain.name}: the kernel has no such chain")
                continue
            # In a built-in chain others may have rules, but none before ours.
            there = [rule.hash for rule in rules][: None if chain.ours else len(wanted)]
            if there != wanted:
                found.append(f"{chain.table} {chain.name}: {_difference(wanted, there)}")
        if view.outgoing:
            tag, kept = view.packet.mark, kernel.tags.get(view.packet.source, 0)
            if kept != tag:
                found.append(f"ipset {TAG_SET}: {view.packet.source} has tag {kept:04X}, and should have {tag:04X}")
        return found


def _difference(wanted: Sequence[str], rules: Sequence[str]) -> str:
    missing = sum(1 for each in wanted if each not in rules)
    more = sum(1 for each in rules if each not in wanted)
    if not missing and not more:
        return "the rules are in another order"
    return f"{missing} of {len(wanted)} rules are missing, {more} are there that should not be"
