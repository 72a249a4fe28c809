"""The one invariant of the model: what its touched parts lead to is what a computation from nothing leads to."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given, settings
from hypothesis import strategies as st

from bus.messages import (
    AppId,
    CellName,
    Container,
    Handle,
    Lease,
    PortForward,
    Ports,
    Protocol,
    Revision,
    SecurityGroup,
    Stage,
    Workload,
    lease_key,
    policy_key,
    tag_key,
)
from bus.security_groups import GroupId, SpaceId
from bus.tables import Update
from services.enforcer.desired import Plan, family_of, plan
from services.enforcer.model import INGRESS_ROUTER, Model, Touched
from services.enforcer.rules import ChainId, Rules
from services.enforcer.settings import EnforcerSettings
from tests.enforcer.outside import may

PLAIN = EnforcerSettings(cell="c", iptables="nft")
SETTINGS = replace(PLAIN, enable_overlay_ingress_rules=True)
APPS = [AppId(name) for name in ("a", "b", "c", "d", INGRESS_ROUTER)]
apps = st.sampled_from(APPS)
ports = st.lists(
    st.builds(Ports, st.sampled_from(Protocol), st.integers(1, 50), st.integers(50, 99)), min_size=1, max_size=2
).map(tuple)
policies = st.tuples(st.builds(policy_key, apps, apps), st.none() | ports)
tags = st.tuples(st.builds(tag_key, apps), st.none() | st.integers(1, 5))
updates = st.lists(policies | tags, min_size=1, max_size=5).map(dict)
SPACES = [SpaceId("s"), SpaceId("t")]
SUBNET = IPv4Network("10.255.1.0/24")
rules = st.sampled_from([may("tcp", "1.2.3.4", 80), may("icmp", "1.2.3.4"), may("all", "5.6.7.8-5.6.7.9")])
handles = st.sampled_from([Handle(f"h{n}") for n in range(5)])
containers = st.builds(
    Container,
    handles,
    st.just("/ns"),
    st.just(Stage.READY),
    st.none() | apps,
    st.sampled_from([IPv4Address(f"10.255.1.{n}") for n in (2, 3, 17)]),
    interface=st.sampled_from([None, "s-x", "veth1"]),
    workload=st.none() | st.sampled_from(Workload),
    space=st.none() | st.sampled_from(SPACES),
    ports=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    forwards=st.lists(
        st.builds(PortForward, st.sampled_from([1, 2, 300]), st.integers(1, 2), st.sampled_from(Protocol)), max_size=2
    ).map(tuple),
    egress=st.lists(rules, max_size=1).map(tuple),
    opened=st.lists(rules, max_size=1).map(tuple),
)
groups = st.builds(
    SecurityGroup,
    st.sampled_from([GroupId(name) for name in "gh"]),
    st.just("group"),
    st.lists(rules, max_size=2).map(tuple),
    st.booleans(),
    st.booleans(),
    st.frozensets(st.sampled_from(SPACES)),
    st.frozensets(st.sampled_from(SPACES)),
)
leases = st.builds(
    lambda n: Lease(SUBNET, CellName("c"), IPv4Address(f"10.0.0.{n}"), "ee:ee:0a:ff:01:00"), st.integers(1, 2)
)
steps = st.lists(updates | containers | handles | groups | st.booleans() | leases, max_size=25)


def feed(model: Model, step: object) -> None:
    """What a replica or a caller would tell: a boolean is whether the table of groups counts."""
    match step:
        case dict():
            model.update_policies(Update(Revision(1), step))
        case Container():
            model.admit(step)
        case SecurityGroup():
            # Empty rules: gone.
            model.update_security_groups(Update(Revision(1), {(step.guid,): step if step.rules else None}))
        case bool():
            model.use_security_groups(step)
        case Lease():
            model.update_leases(Update(Revision(1), {lease_key(step.subnet): step}))
        case _:
            model.forget(step)  # type: ignore[arg-type]


class Kernel:
    """What a kernel would hold after each plan."""

    def __init__(self) -> None:
        self.chains: dict[ChainId, Rules] = {}
        self.tags: dict[IPv4Address, int] = {}
        self.peers: frozenset[IPv4Address] = frozenset()
        self.guests: dict[Handle, IPv4Address] = {}

    def apply(self, planned: Plan) -> None:
        if planned.complete:
            self.chains, self.tags, self.guests = {}, {}, {}
        self.chains |= planned.chains
        for chain in list(self.chains):
            wanted = planned.families.get(family_of(chain.name))
            if wanted is not None and chain.name not in wanted:
                del self.chains[chain]
        for address, tag in planned.tags.items():
            self.tags.pop(address, None)
            if tag is not None:
                self.tags[address] = tag
        self.guests = {h: a for h, a in self.guests.items() if a not in planned.tags} | dict(planned.guests)
        if planned.peers is not None:
            self.peers = planned.peers


@given(st.lists(steps, max_size=4))
@settings(max_examples=250, deadline=None)
def test_what_is_touched_is_all_that_changes(batches: list[list[object]]) -> None:
    model, kernel = Model(), Kernel()
    kernel.apply(plan(SETTINGS, model, Touched(everything=True)))
    model.take_touched()
    for batch in batches:
        for step in batch:
            feed(model, step)
        kernel.apply(plan(SETTINGS, model, model.take_touched()))
        anew = Kernel()
        anew.apply(plan(SETTINGS, model, Touched(everything=True)))
        assert kernel.chains == anew.chains
        assert kernel.tags == anew.tags
        assert kernel.peers == anew.peers
        assert kernel.guests == anew.guests


@given(steps, updates)
@settings(max_examples=100, deadline=None)
def test_every_flow_that_may_have_lost_its_policy_is_checked(
    before: list[object], change: dict[object, object]
) -> None:
    model = Model()
    for step in before:
        if not isinstance(step, str):
            feed(model, step)
    model.take_touched()
    had = {address: dict(model.sources(app)) for address in model.addresses() if (app := model.app_at(address))}
    model.update_policies(Update(Revision(2), change))  # type: ignore[arg-type]
    checks = {check.address: check for check in plan(PLAIN, model, model.take_touched()).flows}
    for address, sources in had.items():
        app = model.app_at(address)
        assert app is not None
        has = model.sources(app)
        for tag in sources.keys() | has.keys():
            if sources.get(tag) != has.get(tag):
                check = checks[address]
                lost = set(sources.get(tag, ())) - set(has.get(tag, ()))
                assert check.lost is None or tag in (check.lost if lost else check.lost | check.gained)
                assert check.sources == has
