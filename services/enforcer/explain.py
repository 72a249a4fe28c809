"""Why a flow passes here, or does not: by the rules that are wanted, and by whether the kernel has them.

The wanted chains are followed with the flow's first packet (`walk`), as the source's cell sees it (its tag, and what it
may reach off the overlay), or as the destination's does. The chains that the packet meets are then read from the kernel
anew, and compared rule by rule, as is the source's tag in the set that gives it. A change on its way to the kernel is
waited for, so that what differs is somebody else's doing.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bus.explaining import MAX_INSTANCES, CellAnswer, Instance, Question, Verdict
from bus.log import about
from bus.messages import AppId, CellName, Container, Protocol, Revision, Tag
from bus.process import KernelThread
from services.enforcer.desired import plan
from services.enforcer.egress import DENIED, list_chain
from services.enforcer.fixed import TAG_SET, static
from services.enforcer.groups import RuleList
from services.enforcer.kernel_view import CannotLook, Held, held, marks
from services.enforcer.model import INGRESS_ROUTER, Model, Touched
from services.enforcer.probe import MAX_CONTAINERS, probe
from services.enforcer.reconciler import Reconciler
from services.enforcer.rules import GUESTS, ChainId, Chains
from services.enforcer.settings import EnforcerSettings
from services.enforcer.tree import group_of
from services.enforcer.walk import CannotFollow, Packet, Walk, walk

log = logging.getLogger(__name__)

LOOKS = 3
"""How often the kernel is looked at before a difference is believed."""
LOOK_AGAIN = 0.3
DENY_NETWORKS = {
    DENIED: "deny_networks_always or metadata_endpoints",
    "sb-deny-running": "deny_networks_running",
    "sb-deny-staging": "deny_networks_staging",
}
_MARKING = (ChainId("mangle", "PREROUTING"), ChainId("mangle", "sb-mark"))
UNNAMED = "?"
"""The link of a container whose plugin did not name it."""
_LOCAL = 2
"""RTN_LOCAL (rtnetlink(7)): the destination is this host itself."""


class CannotExplain(ValueError):
    """The question has no answer on this cell. The text says why, and what to ask instead."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What is asked about: apps or addresses, at least one of which is of this cell."""

    source: AppId | IPv4Address
    destination: AppId | IPv4Address
    protocol: str
    port: int = 0
    icmp: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class _View:
    """One container as an end of the flow, and the packet that its cell sees."""

    container: Container
    outgoing: bool
    packet: Packet
    chain: str
    """FORWARD, or INPUT for what goes to this host."""


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
        if question.targets:
            sources = list(found.sources)
            tried = [self._reconciler.model.containers.get(instance.handle) for instance in sources[:MAX_CONTAINERS]]
            probes = await asyncio.gather(
                *(
                    probe(container, question.protocol, question.port, question.targets)
                    for container in tried
                    if container is not None
                )
            )
            by_handle = dict(zip((c.handle for c in tried if c is not None), probes, strict=True))
            sources = [replace(instance, probes=by_handle.get(instance.handle)) for instance in sources]
            found = replace(found, sources=tuple(sources))
        return found

    async def explain(self, flow: Flow, *, id: str = "") -> CellAnswer:  # noqa: A002 (the message's own word)
        """What this cell says of a flow. Raises CannotExplain."""
        async with self._turn:
            for look in range(1, LOOKS + 1):
                out = await self._route(flow)
                # From here to the look nothing else runs in the loop: the rules are those wanted right now.
                asked = _Asked(self._reconciler, flow, out)
                if not asked.views:
                    break
                problem, kernel = await self._look(asked)
                sources, destinations = asked.said(kernel, problem)
                agree = all(instance.kernel_agrees is not False for instance in (*sources, *destinations))
                if agree or look == LOOKS:
                    return CellAnswer(
                        id, CellName(self._cell), asked.revision, tuple(sources), tuple(destinations), problem
                    )
                await asyncio.sleep(LOOK_AGAIN)
        return CellAnswer(id, CellName(self._cell), self.revision)

    async def _look(self, asked: "_Asked") -> tuple[str, "_Kernel | None"]:
        try:
            return "", await self._thread.run(_Kernel.look, self._reconciler.kind, asked.visited)
        except CannotLook as error:
            log.warning("the kernel cannot be looked at", extra=about(error=str(error)))
            return f"the kernel cannot be looked at: {error}"[:900], None

    async def _route(self, flow: Flow) -> str | None:
        """By which link this host sends to the flow's destination if that is off the overlay; "" to itself."""
        if not isinstance(flow.destination, IPv4Address):
            return None
        if flow.destination in self._reconciler.settings.overlay_network:
            return None
        return await self._thread.run(_route_to, flow.destination)


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What the kernel held at one moment."""

    chains: Held
    tags: "dict[IPv4Address, int]"

    @classmethod
    def look(cls, kind: str, chains: Sequence[ChainId]) -> "_Kernel":
        return cls(held("legacy" if kind == "legacy" else "nft", chains), dict(marks(TAG_SET)))


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
        self._settings: EnforcerSettings = reconciler.settings
        self._model: Model = reconciler.model
        self._flow = flow
        self._out = out
        self.revision = self._model.revision
        self.views = self._find()[:MAX_INSTANCES]
        self._chains: Chains = {}
        self._walks: list[Walk | str] = []
        if self.views:
            self._chains = self._wanted()
            sets = {TAG_SET: self._model.addresses()}
            for view in self.views:
                try:
                    self._walks.append(walk(self._chains, "filter", view.chain, view.packet, sets))
                except CannotFollow as error:
                    self._walks.append(f"a rule that cannot be followed: {error}")

    @property
    def visited(self) -> list[ChainId]:
        """The chains that the packets meet."""
        met = {chain for made in self._walks if isinstance(made, Walk) for chain in made.visited}
        if any(view.outgoing for view in self.views):
            met.update(chain for chain in _MARKING if chain in self._chains)
        return sorted(met)

    def said(self, kernel: _Kernel | None, problem: str) -> tuple[list[Instance], list[Instance]]:
        """The instances as sources and as destinations."""
        sources: list[Instance] = []
        destinations: list[Instance] = []
        for view, made in zip(self.views, self._walks, strict=True):
            (sources if view.outgoing else destinations).append(self._instance(view, made, kernel, problem))
        return sources, destinations

    def _wanted(self) -> Chains:
        """The chains that the packets may meet: the fixed ones, and those of the containers concerned."""
        touched = Touched(egress=self._out is not None)
        for view in self.views:
            to = self._model.container_at(view.packet.destination)
            if to is not None and to.address is not None:
                touched.groups.add(group_of(to.address))
                if to.app is not None:
                    touched.apps[to.app] = {}
        return {**static(self._settings, peers_known=True), **plan(self._settings, self._model, touched).chains}

    # The containers

    def _find(self) -> list[_View]:
        source, destination = self._flow.source, self._flow.destination
        sources, destinations = self._containers(source), self._containers(destination)
        if isinstance(source, IPv4Address) and not sources:
            lease = self._model.lease_of(source)
            hint = "ask for it by its app" if lease is None else f"it is on cell {lease.cell}: ask there, or by its app"
            raise CannotExplain(f"source: {source} is no container of this cell; {hint}")
        source_app = sources[0].app if isinstance(source, IPv4Address) else source
        tag = None if source_app is None else self._model.tags.get(source_app)
        by_vtep = Packet(
            self._settings.overlay_network[0],
            self._settings.overlay_network[-1],
            self._flow.protocol,
            self._flow.port,
            by=self._settings.vtep_name,
            mark=int(tag or 0),
            icmp=self._flow.icmp,
        )
        # On one cell both see the same packet, so it is followed as it comes from the first of the sources.
        views = [
            _View(
                container,
                False,
                self._to(self._from(sources[0], by_vtep) if sources else by_vtep, container),
                "FORWARD",
            )
            for container in destinations
        ]
        for container in sources:
            packet = self._from(container, by_vtep)
            if isinstance(destination, IPv4Address):
                packet = replace(packet, destination=destination)
            if destinations and isinstance(destination, IPv4Address):
                packet = self._to(packet, destinations[0])
            elif self._out is None:
                packet = replace(packet, out=self._settings.vtep_name)
            else:
                packet = replace(packet, out=self._out)
            views.append(_View(container, True, packet, "INPUT" if self._out == "" else "FORWARD"))
        return views

    def _containers(self, end: AppId | IPv4Address) -> list[Container]:
        if isinstance(end, IPv4Address):
            container = self._model.container_at(end)
            return [] if container is None else [container]
        addresses = sorted(self._model.addresses_of(end))
        return [container for at in addresses if (container := self._model.container_at(at)) is not None]

    def _group(self, container: Container) -> int:
        """The device group of its link, which tells containers' links that are not ours."""
        return 0 if (container.interface or "").startswith(self._settings.link_prefix) else GUESTS

    def _from(self, container: Container, packet: Packet) -> Packet:
        tag = None if container.app is None else self._model.tags.get(container.app)
        assert container.address is not None  # noqa: S101 (the model has none without)
        return replace(
            packet,
            source=container.address,
            by=container.interface or UNNAMED,
            by_group=self._group(container),
            mark=int(tag or 0),
        )

    def _to(self, packet: Packet, container: Container) -> Packet:
        assert container.address is not None  # noqa: S101 (as above)
        return replace(
            packet,
            destination=container.address,
            out=container.interface or UNNAMED,
            out_group=self._group(container),
        )

    # The words

    def _instance(self, view: _View, made: Walk | str, kernel: _Kernel | None, problem: str) -> Instance:
        address = view.container.address
        assert address is not None  # noqa: S101 (as above)
        if isinstance(made, str):
            return Instance(view.container.handle, address, Verdict.UNKNOWN, made[:900])
        verdict = {"ACCEPT": Verdict.PASSES, "REJECT": Verdict.REFUSED, "DROP": Verdict.REFUSED}.get(
            made.target, Verdict.UNKNOWN
        )
        rule = "" if made.rule is None else f"{made.rule.match} -j {made.rule.target}".lstrip()
        differences = () if kernel is None else tuple(self._differences(view, made, kernel))
        return Instance(
            view.container.handle,
            address,
            verdict,
            self._reason(view, made, verdict),
            "" if made.chain is None else made.chain.name,
            rule,
            None if kernel is None else not differences,
            differences if kernel is not None else (problem,),
        )

    def _reason(self, view: _View, made: Walk, verdict: Verdict) -> str:
        if verdict is Verdict.UNKNOWN:
            return "none of the enforcer's rules decides: other rules of this host may"
        app = self._app_of(view)
        tag = None if app is None else self._model.tags.get(app)
        to_overlay = made.packet.out == self._settings.vtep_name
        to_container = self._model.container_at(made.packet.destination)
        if to_overlay and verdict is Verdict.PASSES:
            return f"goes to the overlay with tag {tag or 0:04X}; the destination's cell decides"
        if to_container is not None or to_overlay:
            if verdict is Verdict.PASSES:
                return self._allowed_by(app, tag, to_container, made)
            if tag is None:
                return f"{app or 'the source'} is in no policy, so its traffic has no tag"
            destination = None if to_container is None else to_container.app
            return f"no policy from {app} to {destination} allows {self._what()}"
        return self._off_overlay(view.container, made, verdict)

    def _off_overlay(self, container: Container, made: Walk, verdict: Verdict) -> str:
        """By which group, deny network or setting."""
        if made.packet.out == "":
            named = "host_tcp_services, host_udp_services or dns_servers"
            return (
                f"{named} let it to this host" if verdict is Verdict.PASSES else f"none of {named} lets it to this host"
            )
        groups = self._model.security_groups.of(container)
        if verdict is Verdict.PASSES:
            chain = "" if made.chain is None else made.chain.name
            names = [group.name for group in groups if list_chain(RuleList.of(group.rules)) == chain]
            if names:
                return f"security group {' and '.join(names)} lets it out by {made.packet.out}"
            return f"what the container's runtime opened for it lets it out by {made.packet.out}"
        if made.chain is not None and made.chain.name in DENY_NETWORKS and made.rule is not None:
            setting = DENY_NETWORKS[made.chain.name]
            return f"in a denied network ({setting}): {made.rule.match.removeprefix('-d ')}"
        names = sorted(group.name for group in groups)
        return f"no rule of its security groups lets it out ({', '.join(names)[:500] or 'it has none'})"

    def _allowed_by(self, app: AppId | None, tag: Tag | None, to: Container | None, made: Walk) -> str:
        if made.chain is not None and made.chain.name == "sb-open":
            return "disable_container_network_policy is set: containers reach one another without policies"
        if app is not None and to is not None and to.app is not None:
            for ports in self._model.ports(app, to.app):
                if ports.protocol == self._flow.protocol and ports.start <= self._flow.port <= ports.end:
                    span = f"{ports.start}" if ports.start == ports.end else f"{ports.start}-{ports.end}"
                    return f"a policy from {app} (tag {tag or 0:04X}) to {to.app} allows {ports.protocol} {span}"
        if app == INGRESS_ROUTER:
            return f"enable_overlay_ingress_rules is set, and the app listens on port {self._flow.port}"
        return "a rule lets it in that is of no policy"

    def _app_of(self, view: _View) -> AppId | None:
        if view.outgoing:
            return view.container.app
        if isinstance(self._flow.source, IPv4Address):
            return self._model.app_at(self._flow.source)
        return self._flow.source

    def _what(self) -> str:
        return (
            f"{self._flow.protocol} {self._flow.port}" if self._flow.protocol in tuple(Protocol) else "anything of it"
        )

    # The kernel

    def _differences(self, view: _View, made: Walk, kernel: _Kernel) -> list[str]:
        chains = [*made.visited, *(chain for chain in _MARKING if view.outgoing and chain in self._chains)]
        found = []
        for chain in chains:
            wanted = [rule.hash for rule in self._chains[chain]]
            rules = kernel.chains.get(chain)
            if rules is None:
                found.append(f"{chain.table} {chain.name}: the kernel has no such chain")
                continue
            # In a built-in chain others may have rules, but none before ours.
            held_here = [rule.hash for rule in rules][: None if chain.ours else len(wanted)]
            if held_here != wanted:
                found.append(f"{chain.table} {chain.name}: {_difference(wanted, held_here)}")
        if view.outgoing:
            tag, kept = made.packet.mark, kernel.tags.get(made.packet.source, 0)
            if kept != tag:
                found.append(f"ipset {TAG_SET}: {made.packet.source} has tag {kept:04X}, and should have {tag:04X}")
        return found


def _difference(wanted: Sequence[str], rules: Sequence[str]) -> str:
    missing = sum(1 for each in wanted if each not in rules)
    more = sum(1 for each in rules if each not in wanted)
    if not missing and not more:
        return "the rules are in another order"
    return f"{missing} of {len(wanted)} rules are missing, {more} are there that should not be"
