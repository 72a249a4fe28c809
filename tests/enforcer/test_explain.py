"""Explaining flows on a cell: what it says is what packets meet, and it notices when the kernel is not as wanted."""

import asyncio
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient

from bus.explaining import CellAnswer, Instance, Outcome, Question, Verdict
from bus.local import Health, application
from bus.messages import AppId, Protocol, SecurityGroup, Workload
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SpaceId
from bus.tables import Update
from bus.wire import decode, encode
from services.enforcer.explain import Explainer
from services.enforcer.explain_door import ExplainApi
from services.enforcer.viewpoint import CannotExplain, Flow
from tests.enforcer.conftest import Enforcer, enforcing, tags, tcp, udp
from tests.enforcer.world import Box, Cell

pytestmark = pytest.mark.kernel


def explainer(enforcer: Enforcer) -> Explainer:
    return Explainer(enforcer.reconciler, enforcer.kernel, f"cell-{enforcer.cell.number}")


def flow(source: Any, destination: Any, protocol: str = "tcp", port: int = 8080) -> Flow:
    def end(text: Any) -> AppId | IPv4Address:
        return text.address if isinstance(text, Box) else text if isinstance(text, IPv4Address) else AppId(text)

    return Flow(end(source), end(destination), protocol, port)


def at(instances: tuple[Instance, ...], box: Box) -> Instance:
    (one,) = [instance for instance in instances if instance.address == box.address]
    assert one.handle == box.name
    return one


async def test_what_decides_and_that_the_kernel_agrees(cell: Cell, kind: str) -> None:
    web, web2, db = cell.box("web"), cell.box("web"), cell.box("db")
    known = {**tags(web=5, db=6), ("policy", "db", "web"): (tcp(8000, 9000), udp(53))}
    async with enforcing(cell, kind, known=known) as enforcer:
        ask = explainer(enforcer)
        answer = await ask.explain(flow("web", "db"))
        assert answer.revision == 1
        assert {instance.address for instance in answer.sources} == {web.address, web2.address}
        source = at(answer.sources, web)
        assert (source.verdict, source.kernel_agrees) == (Verdict.PASSES, True)
        assert source.reason == "goes to the overlay with tag 0005; the destination's cell decides"
        destination = at(answer.destinations, db)
        assert (destination.verdict, destination.kernel_agrees, destination.differences) == (Verdict.PASSES, True, ())
        assert destination.reason == "a policy from web (tag 0005) to db allows tcp 8000-9000"
        assert destination.chain.startswith("sb-a-")
        assert destination.rule == "-p tcp -m mark --mark 0x5/0xffff -m tcp --dport 8000:9000 -j sb-accept"

        refused = at((await ask.explain(flow("web", "db", "udp", 54))).destinations, db)
        assert (refused.verdict, refused.kernel_agrees) == (Verdict.REFUSED, True)
        assert refused.reason == "no policy from web to db allows udp 54"
        untagged = at((await ask.explain(flow("stranger", "db"))).destinations, db)
        assert untagged.reason == "stranger is in no policy, so its traffic has no tag"
        nothing = await ask.explain(flow("stranger", "nobody"))
        assert (nothing.sources, nothing.destinations) == ((), ())


async def test_where_the_kernel_is_other_it_says_so(cell: Cell, kind: str) -> None:
    web, db = cell.box("web"), cell.box("db")
    known = {**tags(web=5, db=6), ("policy", "db", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known) as enforcer:
        ask = explainer(enforcer)
        good = at((await ask.explain(flow(web, db))).destinations, db)
        chain = good.chain

        async def differs(command: str, words: str) -> None:
            # As somebody else would, again and again, for the enforcer mends it.
            for _ in range(20):
                cell.exec(command)
                answer = await ask.explain(flow(web, db))
                found = [text for each in (*answer.sources, *answer.destinations) for text in each.differences]
                if found:
                    assert any(words in text for text in found), found
                    return
            pytest.fail("never noticed")

        async with stopped(enforcer):
            await differs(f"iptables-{kind} -F {chain}", f"filter {chain}: 1 of 1 rules are missing")
            await enforcer_mends(enforcer)
            await differs(
                f"iptables-{kind} -I {chain} -j DROP", f"filter {chain}: 0 of 1 rules are missing, 1 are there"
            )
            await enforcer_mends(enforcer)
            await differs(f"iptables-{kind} -I FORWARD -j ACCEPT", "filter FORWARD: ")
            await enforcer_mends(enforcer)
            await differs(
                f"ipset -exist add sb-tag {web.address} skbmark 0x7",
                f"{web.address} has tag 0007, and should have 0005",
            )
        await enforcer.reconciler.sync()
        assert at((await ask.explain(flow(web, db))).destinations, db).kernel_agrees is True


class stopped:  # noqa: N801 (used as a function)
    """The enforcer does not look at the kernel by itself."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._reconciler = enforcer.reconciler

    async def __aenter__(self) -> None:
        self._check = self._reconciler._check

        async def nothing() -> None:
            pass

        self._reconciler._check = nothing  # type: ignore[method-assign]

    async def __aexit__(self, *_: object) -> None:
        self._reconciler._check = self._check  # type: ignore[method-assign]


async def enforcer_mends(enforcer: Enforcer) -> None:
    await enforcer.reconciler.sync()


async def test_what_it_says_is_what_packets_meet(two_cells: list[Cell], kind: str) -> None:
    """Both ends' verdicts together against real connections: all pairs, some ports."""
    here, there = two_cells
    boxes = [here.box("a"), here.box("b"), there.box("c"), there.box(None)]
    for box in boxes:
        for port in (7, 8):
            box.serve(port)
    known = {
        **tags(a=1, b=2, c=0x30),
        ("policy", "b", "a"): (tcp(7),),
        ("policy", "c", "a"): (tcp(7, 9), udp(7)),
        ("policy", "a", "c"): (tcp(8),),
        ("policy", "a", "a"): (tcp(8),),
    }
    async with enforcing(here, kind, known=known) as one, enforcing(there, kind, known=known) as two:
        enforcers = {here.number: one, there.number: two}
        for source in boxes:
            for destination in boxes:
                if source is destination:
                    continue
                for port in (7, 8):
                    met = await asyncio.to_thread(source.reaches, destination, port)
                    at_source = explainer(enforcers[source.cell.number])
                    said = await at_source.explain(flow(source, destination, "tcp", port))
                    verdicts = [at(said.sources, source).verdict]
                    if source.cell is not destination.cell and source.container.app:
                        at_destination = explainer(enforcers[destination.cell.number])
                        asked = flow(source.container.app, destination, "tcp", port)
                        verdicts.append(at((await at_destination.explain(asked)).destinations, destination).verdict)
                    assert (set(verdicts) == {Verdict.PASSES}) == met, (source.container.app, destination, port, said)


async def test_off_the_overlay_the_group_or_the_denied_network_is_named(cell: Cell, kind: str) -> None:
    web = cell.box("web")
    web.container = replace(web.container, workload=Workload.APP, space=SpaceId("s"))
    cell.ip("route add default dev under")
    group = SecurityGroup(
        GroupId("g"),
        "public",
        (EgressRule(EgressProtocol.TCP, (AddressRange.parse("203.0.113.0/24"),), ((443, 443), (8000, 8100))),),
        running_default=True,
    )
    settings = {"deny_networks_running": ("203.0.113.9/32",)}
    async with enforcing(cell, kind, known=tags(web=5), **settings) as enforcer:
        enforcer.reconciler.model.update_security_groups(Update(1, {("g",): group}))  # type: ignore[arg-type]
        enforcer.reconciler.model.use_security_groups(True)
        await enforcer.reconciler.sync()
        ask = explainer(enforcer)

        async def off(address: str, port: int, protocol: str = "tcp") -> Instance:
            return at((await ask.explain(flow(web, IPv4Address(address), protocol, port))).sources, web)

        passes = await off("203.0.113.1", 8005)
        assert (passes.verdict, passes.kernel_agrees) == (Verdict.PASSES, True), passes
        assert passes.reason == "security group public lets it out by under"
        assert passes.chain.startswith("sb-s-")
        denied = await off("203.0.113.9", 443)
        assert (denied.verdict, denied.kernel_agrees) == (Verdict.REFUSED, True)
        assert denied.reason == "in a denied network (deny_networks_running): 203.0.113.9/32"
        for address, port, protocol in (
            ("203.0.113.1", 444, "tcp"),
            ("203.0.113.1", 443, "udp"),
            ("198.51.100.1", 443, "tcp"),
        ):
            refused = await off(address, port, protocol)
            assert refused.verdict is Verdict.REFUSED
            assert refused.reason == "no rule of its security groups lets it out (public)"
        metadata = await off("169.254.169.254", 80)
        assert metadata.reason.startswith("in a denied network (deny_networks_always or metadata_endpoints)")
        for nobody in (cell.subnet[200], IPv4Address("10.255.200.1")):
            unleased = await off(str(nobody), 80)
            assert unleased.verdict is Verdict.REFUSED
            assert unleased.reason == f"{nobody} is on the overlay, and no container has it"
        host = await off(str(cell.underlay), 22)
        assert (host.verdict, host.kernel_agrees) == (Verdict.REFUSED, True)
        assert host.reason == "none of host_tcp_services, host_udp_services or dns_servers lets it to this host"


async def test_before_anything_is_enforced_it_says_so(cell: Cell) -> None:
    cell.box("web")
    async with enforcing(cell, "nft", begin=False) as enforcer:
        (source,) = (await explainer(enforcer).explain(flow("web", "db"))).sources
        assert (source.verdict, source.kernel_agrees) == (Verdict.REFUSED, None)
        assert source.differences == ("nothing is enforced yet but the fence: the tables are not usable yet",)


async def test_a_question_that_belongs_elsewhere(two_cells: list[Cell]) -> None:
    here, there = two_cells
    here.box("web")
    async with enforcing(here, "nft", known=tags(web=5)) as enforcer:
        with pytest.raises(CannotExplain, match="it is on cell cell-2: ask there, or by its app"):
            await explainer(enforcer).explain(flow(there.subnet[9], "web"))


async def test_over_http_ends_are_apps_or_addresses(cell: Cell) -> None:
    web, db = cell.box("web"), cell.box("db")
    known = {**tags(web=5, db=6), ("policy", "db", "web"): (tcp(8080),)}
    async with (
        enforcing(cell, "nft", known=known) as enforcer,
        AsyncClient(
            transport=ASGITransport(application(ExplainApi(explainer(enforcer), "cell-1").routes(), Health())),
            base_url="http://enforcer",
        ) as api,
    ):
        for source, destination in ((web.address, db.address), ("web", db.address), (web.address, "db"), ("web", "db")):
            ends = {"source": str(source), "destination": str(destination)}
            answer = (await api.get("/explain", params={**ends, "port": "8080"})).raise_for_status().json()
            assert (answer["cell"], answer["revision"]) == ("cell-1", 1)
            (to,) = answer["destinations"]
            assert (to["address"], to["verdict"], to["kernel_agrees"]) == (str(db.address), "passes", True)
        ping = await api.get("/explain", params={"source": str(web.address), "destination": "db", "protocol": "icmp"})
        assert ping.json()["destinations"][0]["verdict"] == "refused"
        assert ping.json()["destinations"][0]["reason"].startswith("policies are of tcp and udp")
        for query, words in (
            ("source=web&destination=db", "port: must be a number in 1..65535"),
            ("source=web&destination=db&port=70000", "port: must be a number in 1..65535"),
            ("destination=db&port=1", "source: must be an app or an address"),
            ("source=web&destination=db&port=1&protocol=sctp", "protocol: must be tcp, udp or icmp"),
            ("source=web&destination=db&port=1&ports=1", "ports: no such parameter"),
            ("source=10.255.1.99&destination=db&port=1", "10.255.1.99 is no container of this cell"),
        ):
            refused = await api.get(f"/explain?{query}")
            assert refused.status_code == 400
            assert words in refused.json()["error"]


async def test_what_lets_in_without_a_policy_is_named(cell: Cell) -> None:
    web, db = cell.box("web"), cell.box("db")
    db.container = replace(db.container, ports=(8080,))
    async with enforcing(cell, "nft", known=tags(INGRESS_ROUTER=9), enable_overlay_ingress_rules=True) as enforcer:
        (routed,) = (await explainer(enforcer).explain(flow("INGRESS_ROUTER", "db"))).destinations
        assert (routed.verdict, routed.kernel_agrees) == (Verdict.PASSES, True)
        assert routed.reason == "enable_overlay_ingress_rules is set, and the app listens on port 8080"
        (other,) = (await explainer(enforcer).explain(flow("INGRESS_ROUTER", "db", port=81))).destinations
        assert other.verdict is Verdict.REFUSED
    async with enforcing(cell, "nft", known={}, disable_container_network_policy=True) as enforcer:
        (opened,) = (await explainer(enforcer).explain(flow(web, db))).destinations
        assert (opened.verdict, opened.kernel_agrees) == (Verdict.PASSES, True)
        assert opened.reason.startswith("disable_container_network_policy is set")


async def test_a_probe_meets_what_a_container_would(cell: Cell, kind: str) -> None:
    web, db, closed = cell.box("web"), cell.box("db"), cell.box("db")
    db.serve(8080)
    known = {**tags(web=5, db=6), ("policy", "db", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known) as enforcer:
        targets = (db.address, closed.address, cell.subnet[200])

        async def ask(port: int, protocol: Protocol = Protocol.TCP) -> list[Outcome]:
            question = Question("id", AppId("web"), AppId("db"), protocol, port, targets)
            answer = await explainer(enforcer).answer(question)
            probes = at(answer.sources, web).probes
            assert probes is not None
            assert [probe.address for probe in probes] == list(targets)
            assert CellAnswer.decode("cell-1", fields(answer)) == answer
            return [probe.outcome for probe in probes]

        opened = await ask(8080)
        assert opened[:2] == [Outcome.CONNECTED, Outcome.REFUSED]
        assert opened[2] in (Outcome.REFUSED, Outcome.TIMEOUT, Outcome.UNREACHABLE)
        assert (await ask(8081))[:2] == [Outcome.REFUSED, Outcome.REFUSED]
        # The kernel says no more than some times a second that something is refused (icmp(7), icmp_ratelimit).
        assert (await ask(8080, Protocol.UDP))[0] in (Outcome.REFUSED, Outcome.SENT)


async def test_a_container_whose_namespace_is_gone_says_so(cell: Cell) -> None:
    web, db = cell.box("web"), cell.box("db")
    web.container = replace(web.container, netns="/run/netns/no-such")
    async with enforcing(cell, "nft", known=tags(web=5)) as enforcer:
        question = Question("id", AppId("web"), AppId("db"), Protocol.TCP, 8080, (db.address,))
        (source,) = (await explainer(enforcer).answer(question)).sources
        assert source.probes is not None
        assert source.probes[0].outcome is Outcome.FAILED
        assert "/run/netns/no-such cannot be entered" in source.probes[0].error
        assert not Path("/run/netns/no-such").exists()


def fields(answer: CellAnswer) -> Any:
    return decode(encode(answer.encode()), "answer")
