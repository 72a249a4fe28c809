"""Which flows go and which stay when policies and containers go, those of forwarded ports and off the overlay, too."""

import asyncio
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from bus.messages import Handle, PortForward, Workload
from bus.security_groups import AddressRange, EgressProtocol, EgressRule
from services.enforcer.flows import Flows
from services.enforcer.rules import DEAD
from tests.enforcer.conftest import enforcing, tags, tcp, udp
from tests.enforcer.outside import NEAR, ROUTER, Outside
from tests.enforcer.world import Cell, dial, echoes, inside, is_cut

pytestmark = pytest.mark.kernel
KNOWN = {**tags(web=1, api=0x1234, db=3), ("policy", "api", "web"): (tcp(8080), udp(8080))}
ANYWHERE = EgressRule(EgressProtocol.ALL, (AddressRange(IPv4Address("198.51.100.0"), IPv4Address("198.51.100.255")),))


async def test_a_revoked_policy_leaves_what_it_did_not_let_in(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    outside = Outside([cell], 9000)
    api.container = replace(
        api.container, workload=Workload.APP, forwards=(PortForward(61000, 8080),), egress=(ANYWHERE,)
    )
    api.serve(8080)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        policy = web.tcp(api, 8080)
        forwarded = dial(outside.network, cell.underlay, 61000)
        out = dial(api, NEAR, 9000)
        host = dial(cell, api.address, 8080)
        kept = {"forwarded": forwarded, "out": out, "host": host}
        for flow in (policy, *kept.values()):
            assert echoes(flow)
        await enforcer.allow("web", "api")
        assert is_cut(policy)
        await asyncio.sleep(0.5)
        for name, flow in kept.items():
            assert echoes(flow), name
        # With the container go all of them, whoever has its address next, and however soon.
        api_next = replace(api.container, handle=Handle("next"), forwards=(), egress=())
        gone, come = enforcer.reconciler.forget(api.container.handle), enforcer.reconciler.admit(api_next)
        await asyncio.gather(gone, come)
        assert str(api.address) not in cell.exec("conntrack -L")
        for name in ("forwarded", "out"):
            assert not echoes(kept[name]), name
        assert ROUTER not in (api.address, web.address)


async def test_dead_flows_are_forgotten_once_the_kernel_has(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        flows: Flows = enforcer.reconciler._dataplane._flows
        datagrams = web.udp(api, 8080)
        assert echoes(datagrams)
        await enforcer.allow("web", "api")
        await enforcer.reconciler.sync()
        assert flows._dead == {(api.address, 1)}
        assert [flow.mark & DEAD for flow in inside(cell.name, lambda: list(Flows()._conntrack.marked(DEAD)))] == [DEAD]
        cell.exec("conntrack -F")
        await enforcer.reconciler.sync()
        assert flows._dead == set()
