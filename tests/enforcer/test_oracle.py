"""The kernel against an oracle: for any policies, groups and containers each probe passes if and only if it says so.

The namespaces stand for all examples of a kind; each example tells two enforcers anew who is there and what is allowed,
and then tries everything with real packets.
"""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.messages import AppId, PortForward, Ports, Protocol, SecurityGroup, Workload, policy_key
from bus.security_groups import GroupId, SpaceId
from tests.enforcer.conftest import Enforcer, enforcing, tags
from tests.enforcer.oracle import Place, World, passes
from tests.enforcer.outside import FAR, METADATA, NEAR, ROUTER, THIRD, Outside, may, tell_groups
from tests.enforcer.world import Box, Cell, Namespace, cells, inside

pytestmark = pytest.mark.kernel
EXAMPLES = 12
PORTS = (8080, 8081)
TAGS = {"a": 1, "b": 0x1234, "INGRESS_ROUTER": 0xFFFF}
DENIED = {"deny_networks_always": (f"{THIRD}",), "deny_networks_running": (f"{FAR}",)}

apps = st.sampled_from(["a", "b", "untagged", None])
spans = st.sampled_from([(8080, 8080), (8081, 9000), (1, 65535)])
ports = st.builds(lambda protocol, span: Ports(protocol, *span), st.sampled_from(Protocol), spans)
policies = st.dictionaries(
    st.tuples(apps.filter(bool), apps.filter(bool)), st.lists(ports, min_size=1, max_size=2).map(tuple), max_size=6
)
where = st.sampled_from([f"{NEAR}", "198.51.100.0/24", "0.0.0.0/0", f"{NEAR}-{FAR},{METADATA}", "10.77.0.0/16"])
rules = st.builds(lambda protocol, to, span: may(protocol, to, span), st.sampled_from(["tcp", "udp"]), where, spans) | (
    st.builds(may, st.sampled_from(["all", "icmp"]), where)
)
some_rules = st.lists(rules, max_size=2).map(tuple)
spaces = st.sampled_from([SpaceId("s"), SpaceId("t")])
groups = st.builds(
    SecurityGroup,
    st.sampled_from([GroupId(name) for name in "ghi"]),
    st.just("group"),
    some_rules,
    st.booleans(),
    st.booleans(),
    st.frozensets(spaces),
    st.frozensets(spaces),
)
described = st.fixed_dictionaries(
    {
        "app": apps,
        "workload": st.none() | st.sampled_from(Workload),
        "space": st.none() | spaces,
        "egress": some_rules,
        "opened": st.just(()) | some_rules,
        "forwards": st.booleans(),
    }
)


class Stage:
    """Two cells with three containers each, and their enforcers, standing still between examples."""

    def __init__(self, made: list[Cell], kind: str) -> None:
        self.cells = made
        self.boxes = [cell.box(None) for cell in made for _ in range(3)]
        self.outside = Outside(made, *PORTS)
        for box in self.boxes:
            for port in PORTS:
                box.serve(port)
        for cell in made:
            cell.sysctl(net__ipv4__icmp_ratelimit=0)  # every refusal is told
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.enforcers: list[Enforcer] = self.runner.run(self._enter(kind))
        self.known: dict[tuple[str, ...], Any] = {}
        self.groups: set[str] = set()

    async def _enter(self, kind: str) -> list[Enforcer]:
        return [await self.stack.enter_async_context(enforcing(cell, kind, **DENIED)) for cell in self.cells]

    def close(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()

    async def become(self, boxes: list[dict[str, Any]], policies: dict[Any, Any], groups: list[SecurityGroup]) -> World:
        forwards = [PortForward(61000 + n, 8080) for n in range(len(boxes))]
        for box, described, forward in zip(self.boxes, boxes, forwards, strict=True):
            box.container = replace(box.container, **described | {"forwards": (forward,) * described["forwards"]})
        by_guid = {group.guid: group for group in groups}
        wanted = {policy_key(AppId(to), AppId(source)): allowed for (source, to), allowed in policies.items()}
        gone = tuple(self.groups - by_guid.keys())
        for cell, enforcer in zip(self.cells, self.enforcers, strict=True):
            await tell_groups(enforcer, *by_guid.values(), gone=gone)
            await enforcer.tell({**dict.fromkeys(self.known), **tags(**TAGS), **wanted})
            for box in cell.boxes:
                await enforcer.reconciler.admit(box.container)
        self.known, self.groups = wanted, set(by_guid)
        denied: dict[Workload | None, tuple[IPv4Network, ...]] = {
            None: (IPv4Network(THIRD), IPv4Network(METADATA)),
            Workload.APP: (IPv4Network(FAR),),
        }
        return World(
            {box.address: box.container for box in self.boxes},
            {box.address: box.cell.underlay for box in self.boxes},
            frozenset(TAGS),
            policies,
            tuple(by_guid.values()),
            denied,
        )


@pytest.fixture(scope="module", params=["nft", "legacy"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch, cells(2) as made:
        patch.setenv("XTABLES_LOCKFILE", str(tmp_path_factory.mktemp("lock") / "xtables.lock"))
        stage = Stage(made, str(request.param))
        try:
            yield stage
        finally:
            stage.close()


def got_through(sender: Namespace, address: IPv4Address, protocol: str, port: int) -> bool:
    """Whether somebody there answers: a refusal comes at once, and silence counts as one."""

    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)

    with inside(sender.name, make) as made:
        made.settimeout(2)
        try:
            made.connect((str(address), port))
            made.send(b"x")
            return made.recv(16) == b"x"
        except OSError:
            return False


@given(st.lists(described, min_size=6, max_size=6), policies, st.lists(groups, max_size=3))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_kernel_lets_through_what_the_oracle_says(
    stage: Stage, boxes: list[dict[str, Any]], policies: dict[Any, Any], groups: list[SecurityGroup]
) -> None:
    world = stage.runner.run(stage.become(boxes, policies, groups))
    hosts = [cell.underlay for cell in stage.cells]
    senders: list[tuple[Place, Namespace]] = [(("container", box.address), box) for box in stage.boxes]
    senders.append((("outside", ROUTER), stage.outside.network))
    for source, sender in senders:
        probes = [(box.address, protocol, 8081) for box in stage.boxes if box is not sender for protocol in Protocol]
        probes += [(box.address, Protocol.TCP, 8080) for box in stage.boxes if box is not sender]
        probes += [(host, Protocol.TCP, 61000 + n) for host in hosts for n in range(6) if sender is not at(stage, n)]
        if isinstance(sender, Box):
            probes += [(to, protocol, 8080) for to in (NEAR, FAR, THIRD, METADATA) for protocol in Protocol]
        for to, protocol, port in probes:
            expected = passes(world, source, to, protocol, port)
            assert got_through(sender, to, protocol, port) == expected, f"{source} to {to} {protocol} {port}"


def at(stage: Stage, number: int) -> Box:
    return stage.boxes[number]
