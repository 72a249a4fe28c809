"""The wanted chains as a whole, followed by packets, against what policies and security groups mean by themselves."""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.messages import (
    AppId,
    CellName,
    Container,
    Handle,
    Lease,
    Ports,
    Protocol,
    Revision,
    SecurityGroup,
    Stage,
    Tag,
    Workload,
    lease_key,
    policy_key,
    tag_key,
)
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SpaceId
from bus.tables import Update
from services.enforcer.desired import plan
from services.enforcer.fixed import TAG_SET
from services.enforcer.model import Model, Touched
from services.enforcer.settings import EnforcerSettings
from services.enforcer.walk import CannotFollow, Packet, matches, walk

CELL = EnforcerSettings(cell="c1", iptables="nft", state_dir=Path("/nowhere"))
APPS = [AppId(name) for name in ("a", "b", "c")]
PORTS = st.sampled_from([1, 79, 80, 81, 443, 8080, 65535])
SPANS = st.tuples(PORTS, PORTS).map(lambda span: (min(span), max(span)))
OUTSIDE = [IPv4Address(text) for text in ("8.8.8.8", "8.8.8.9", "10.0.0.1", "169.254.169.254", "255.255.255.254")]
RANGES = st.sampled_from(
    [AddressRange.parse(text) for text in ("0.0.0.0/0", "8.8.8.8", "8.8.8.0/30", "8.8.8.9-10.0.0.1", "10.0.0.0/8")]
)


@st.composite
def egress_rules(draw: st.DrawFn) -> EgressRule:
    protocol = draw(st.sampled_from(list(EgressProtocol)))
    ports: tuple[tuple[int, int], ...] = ()
    kind = code = None
    if protocol in (EgressProtocol.TCP, EgressProtocol.UDP):
        ports = tuple(draw(st.lists(SPANS, min_size=1, max_size=20)))
    if protocol is EgressProtocol.ICMP:
        kind = draw(st.sampled_from([None, 0, 8]))
        code = None if kind is None else draw(st.sampled_from([None, 0, 1]))
    destinations = tuple(draw(st.lists(RANGES, min_size=1, max_size=3)))
    return EgressRule(protocol, destinations, ports, kind, code, log=draw(st.booleans()))


@dataclass
class World:
    """A cell with containers, and what is said of them."""

    policies: dict[tuple[AppId, AppId], tuple[Ports, ...]]
    tags: dict[AppId, Tag]
    containers: list[Container]
    groups: list[SecurityGroup]
    denied: list[IPv4Network]
    model: Model = field(default_factory=Model)

    def __post_init__(self) -> None:
        changes: dict[tuple[str, ...], object] = {tag_key(app): tag for app, tag in self.tags.items()}
        changes |= {policy_key(to, by): ports for (by, to), ports in self.policies.items()}
        self.model.update_policies(Update(Revision(1), changes))  # type: ignore[arg-type]
        subnet = IPv4Network("10.255.1.0/24")
        lease = Lease(subnet, CellName("c1"), IPv4Address("10.77.0.1"), "ee:ee:0a:ff:01:00")
        self.model.update_leases(Update(Revision(1), {lease_key(subnet): lease}))
        self.model.update_security_groups(Update(Revision(1), {(group.guid,): group for group in self.groups}))
        self.model.use_security_groups(True)
        for container in self.containers:
            self.model.admit(container)

    @property
    def settings(self) -> EnforcerSettings:
        return EnforcerSettings(
            cell="c1", iptables="nft", state_dir=Path("/nowhere"), deny_networks_running=tuple(map(str, self.denied))
        )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    protocols = st.sampled_from(list(Protocol))
    ports = st.builds(lambda protocol, span: Ports(protocol, *span), protocols, SPANS)
    policies = draw(
        st.dictionaries(
            st.tuples(st.sampled_from(APPS), st.sampled_from(APPS)),
            st.lists(ports, min_size=1, max_size=3, unique=True).map(tuple),
            max_size=5,
        )
    )
    # Each app in a policy has a tag, and perhaps another that its policies are long gone.
    tags = {app: Tag(number) for number, app in enumerate(APPS, 0x1FF) if draw(st.booleans())}
    workloads = st.sampled_from([*Workload, None])
    spaces = st.sampled_from([None, SpaceId("s"), SpaceId("t")])
    containers = [
        Container(
            Handle(f"h{number}"),
            "/n",
            Stage.READY,
            draw(st.sampled_from([*APPS, None])),
            IPv4Address("10.255.1.2") + 9 * number,
            draw(st.sampled_from([f"s-{number}", f"cali{number}", None])),
            draw(workloads),
            draw(spaces),
            egress=tuple(draw(st.lists(egress_rules(), max_size=1))),
            opened=tuple(draw(st.lists(egress_rules(), max_size=1))),
        )
        for number in range(draw(st.integers(1, 4)))
    ]
    groups = [
        SecurityGroup(
            GroupId(f"g{number}"),
            f"g{number}",
            tuple(draw(st.lists(egress_rules(), max_size=3))),
            running_default=draw(st.booleans()),
            staging_default=draw(st.booleans()),
            running_spaces=frozenset(draw(st.sets(st.just(SpaceId("s"))))),
            staging_spaces=frozenset(draw(st.sets(st.just(SpaceId("t"))))),
        )
        for number in range(draw(st.integers(0, 3)))
    ]
    denied = draw(st.lists(st.sampled_from([IPv4Network("8.8.8.8/32"), IPv4Network("10.0.0.0/8")]), max_size=2))
    return World(policies, tags, containers, groups, denied)


# The meaning, written down once more without any rule or chain.


def let_in(world: World, source: AppId | None, to: Container, protocol: str, port: int) -> bool:
    if source is None or to.app is None or source not in world.tags:
        return False
    allowed = world.policies.get((source, to.app), ())
    return any(each.protocol == protocol and each.start <= port <= each.end for each in allowed)


def rules_of(world: World, container: Container) -> list[EgressRule]:
    rules = list(container.opened)
    if container.space is None:
        return rules + list(container.egress)
    for group in world.groups:
        if container.workload is Workload.STAGING:
            bound = group.staging_default or container.space in group.staging_spaces
        else:
            bound = container.workload is not None and (
                group.running_default or container.space in group.running_spaces
            )
        rules += group.rules if bound else ()
    return rules


def let_out(world: World, container: Container, packet: Packet) -> bool:
    if packet.destination == IPv4Address("169.254.169.254"):
        return False
    running = container.workload in (Workload.APP, Workload.TASK)
    if running and any(packet.destination in network for network in world.denied):
        return False
    return any(
        any(span.first <= packet.destination <= span.last for span in rule.destinations)
        and (rule.protocol is EgressProtocol.ALL or rule.protocol == packet.protocol)
        and (not rule.ports or any(start <= packet.port <= end for start, end in rule.ports))
        and (rule.icmp_type is None or (packet.icmp is not None and rule.icmp_type == packet.icmp[0]))
        and (rule.icmp_code is None or (packet.icmp is not None and rule.icmp_code == packet.icmp[1]))
        for rule in rules_of(world, container)
    )


def links(container: Container) -> tuple[str, int]:
    return container.interface or "?", 0 if (container.interface or "").startswith("s-") else 0x7362


@settings(max_examples=150, deadline=None)
@given(worlds(), st.data())
def test_packets_meet_what_policies_and_groups_mean(world: World, data: st.DataObject) -> None:
    chains = plan(world.settings, world.model, Touched(everything=True)).chains
    sets = {TAG_SET: world.model.addresses()}

    def passes(packet: Packet) -> bool:
        made = walk(chains, "filter", "FORWARD", packet, sets)
        assert made.target in ("ACCEPT", "REJECT", "DROP"), made
        return made.target == "ACCEPT"

    port = data.draw(PORTS)
    protocol = data.draw(st.sampled_from(["tcp", "udp"]))
    for to in world.containers:
        assert to.address is not None
        out, out_group = links(to)
        for source in [*APPS, None]:
            mark = int(world.tags.get(source, 0)) if source is not None else 0
            there = Packet(
                IPv4Address("10.255.9.9"),
                to.address,
                protocol,
                port,
                by="silk-vtep",
                out=out,
                mark=mark,
                out_group=out_group,
            )
            assert passes(there) == let_in(world, source, to, protocol, port)
        for by in world.containers:
            assert by.address is not None
            link, group = links(by)
            mark = int(world.tags.get(by.app, 0)) if by.app is not None else 0
            here = Packet(by.address, to.address, protocol, port, link, out, mark, by_group=group, out_group=out_group)
            assert passes(here) == let_in(world, by.app, to, protocol, port)
    for by in world.containers:
        assert by.address is not None
        link, group = links(by)
        mark = int(world.tags.get(by.app, 0)) if by.app is not None else 0
        for destination in OUTSIDE:
            for kind, icmp in (("tcp", None), ("udp", None), ("icmp", (8, 0)), ("icmp", (8, 1)), ("47", None)):
                packet = Packet(by.address, destination, kind, port, link, "eth0", mark, icmp, by_group=group)
                assert passes(packet) == let_out(world, by, packet), (by, packet)
        nobody = Packet(by.address, IPv4Address("10.255.77.1"), "tcp", port, link, "eth0", mark, by_group=group)
        assert not passes(nobody)
        over = Packet(by.address, IPv4Address("10.255.77.1"), protocol, port, link, "silk-vtep", mark, by_group=group)
        assert passes(over) == (mark != 0)


@pytest.mark.parametrize(
    ("match", "taken"),
    [
        ("", True),
        ("-i s-+", True),
        ("! -i s-+", False),
        ("-o eth1", False),
        ("-p tcp -m tcp --dport 8000:8100", True),
        ("-p tcp -m tcp ! --dport 8080", False),
        ("-p tcp -m multiport --dports 80,8079:8081", True),
        ("-p udp -m udp --dport 8080", False),
        ("-m mark --mark 0x5/0xffff", True),
        ("-m mark ! --mark 0x0/0xffff", True),
        ("-m connmark --mark 0x80000000/0x80000000", False),
        ("-p tcp -m tcp ! --syn -m conntrack --ctstate NEW", False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", False),
        ("-m iprange --dst-range 8.8.8.0-8.8.8.8", True),
        ("-m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 1 --hashlimit-mode dstip --hashlimit-name n", True),
        ("-m hashlimit --hashlimit-above 1/sec --hashlimit-burst 1 --hashlimit-mode dstip --hashlimit-name n", False),
        ("-m set --match-set known src", True),
        ("-m set ! --match-set known src", False),
        ("-m comment --comment sb:1 -p udp", None),
        ("-m set --match-set unknown src", None),
        ("-m owner --uid-owner 0", None),
    ],
)
def test_each_word_means_what_it_does_to_the_kernel_and_others_are_not_guessed(match: str, taken: bool | None) -> None:
    packet = Packet(IPv4Address("10.255.1.2"), IPv4Address("8.8.8.8"), "tcp", 8080, "s-1", "eth0", mark=0x80005)
    sets = {"known": {packet.source}}
    if taken is None:
        with pytest.raises(CannotFollow):
            matches(match, packet, sets)
    else:
        assert matches(match, packet, sets) is taken
