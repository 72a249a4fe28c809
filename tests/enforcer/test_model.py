"""The one invariant of the model: what its touched parts lead to is what a computation from nothing leads to."""

from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from bus.messages import AppId, Container, Handle, Ports, Protocol, Revision, Stage, Tag, policy_key, tag_key
from bus.tables import Update
from services.enforcer.desired import FlowCheck, Plan, family_of, plan
from services.enforcer.model import Model, Touched
from services.enforcer.rules import ChainId, Rules
from services.enforcer.settings import EnforcerSettings

SETTINGS = EnforcerSettings(cell="c", iptables="nft")
APPS = [AppId(name) for name in ("a", "b", "c", "d")]
apps = st.sampled_from(APPS)
ports = st.lists(
    st.builds(Ports, st.sampled_from(Protocol), st.integers(1, 50), st.integers(50, 99)), min_size=1, max_size=2
).map(tuple)
policies = st.tuples(st.builds(policy_key, apps, apps), st.none() | ports)
tags = st.tuples(st.builds(tag_key, apps), st.none() | st.integers(1, 5))
updates = st.lists(policies | tags, min_size=1, max_size=5).map(dict)
handles = st.sampled_from([Handle(f"h{n}") for n in range(5)])
containers = st.builds(
    Container,
    handles,
    st.just("/ns"),
    st.just(Stage.READY),
    st.none() | apps,
    st.sampled_from([IPv4Address(f"10.255.1.{n}") for n in (2, 3, 17)]),
)
steps = st.lists(updates | containers | handles, max_size=25)


class Kernel:
    """What a kernel would hold after each plan."""

    def __init__(self) -> None:
        self.chains: dict[ChainId, Rules] = {}
        self.tags: dict[IPv4Address, Tag] = {}
        self.checked: list[FlowCheck] = []

    def apply(self, planned: Plan) -> None:
        if planned.complete:
            self.chains, self.tags = {}, {}
        self.chains |= planned.chains
        for chain in list(self.chains):
            wanted = planned.families.get(family_of(chain.name))
            if wanted is not None and chain.name not in wanted:
                del self.chains[chain]
        for address, tag in planned.tags.items():
            self.tags.pop(address, None)
            if tag is not None:
                self.tags[address] = tag


@given(st.lists(steps, max_size=6))
@settings(max_examples=200, deadline=None)
def test_what_is_touched_is_all_that_changes(batches: list[list[object]]) -> None:
    model, kernel = Model(), Kernel()
    kernel.apply(plan(SETTINGS, model, Touched(everything=True)))
    model.take_touched()
    for batch in batches:
        for step in batch:
            if isinstance(step, dict):
                model.update_policies(Update(Revision(1), step))
            elif isinstance(step, Container):
                model.admit(step)
            else:
                model.forget(step)  # type: ignore[arg-type]
        kernel.apply(plan(SETTINGS, model, model.take_touched()))
        anew = Kernel()
        anew.apply(plan(SETTINGS, model, Touched(everything=True)))
        assert kernel.chains == anew.chains
        assert kernel.tags == anew.tags


@given(steps, updates)
@settings(max_examples=200, deadline=None)
def test_every_flow_that_may_have_lost_its_policy_is_checked(
    before: list[object], change: dict[object, object]
) -> None:
    model = Model()
    for step in before:
        if isinstance(step, dict):
            model.update_policies(Update(Revision(1), step))
        elif isinstance(step, Container):
            model.admit(step)
    model.take_touched()
    had = {address: dict(model.sources(app)) for address in model.addresses() if (app := model.app_at(address))}
    model.update_policies(Update(Revision(2), change))  # type: ignore[arg-type]
    checks = {check.address: check for check in plan(SETTINGS, model, model.take_touched()).flows}
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
