"""What containers reach off the overlay, and who reaches them from there, with real packets."""

import socket
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from bus.messages import AppId, Workload, tag_key
from services.enforcer import egress
from services.enforcer.rules import Rule, Rules, rule
from tests.enforcer.conftest import enforcing, tags, tcp
from tests.enforcer.outside import (
    FAR,
    METADATA,
    NEAR,
    ROUTER,
    THIRD,
    Outside,
    answered,
    forward,
    group,
    may,
    of,
    reaches,
    tell_groups,
)
from tests.enforcer.test_attacks import echo, heard
from tests.enforcer.world import Box, Cell, Echo, dial, echoes, inside, is_cut, until

pytestmark = pytest.mark.kernel
KNOWN = tags(web=1, api=0x1234, db=3)
ALL = may("all", "0.0.0.0/0")


async def test_groups_let_out_what_they_say_and_change_while_the_container_runs(cell: Cell, kind: str) -> None:
    app, staging, other = of(cell.box("web")), of(cell.box(None), Workload.STAGING), of(cell.box(None), None)
    Outside([cell], 80, 8080)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        for box in (app, staging, other):
            assert not reaches(box, NEAR, 80)
        await tell_groups(
            enforcer,
            group("public", may("tcp", f"{NEAR}-{FAR}", 80, (8000, 8079)), running="default"),
            group("udp", may("udp", f"{NEAR}", 8080), running="space-1"),
            group("elsewhere", ALL, running="space-2", staging="space-2"),
            group("build", may("tcp", f"{THIRD}", 80), staging="default"),
        )
        assert reaches(app, NEAR, 80)
        assert reaches(app, FAR, 80)
        assert not reaches(app, THIRD, 80)
        assert not reaches(app, NEAR, 8080)
        assert answered(app, NEAR, 8080)
        assert not answered(app, NEAR, 80)
        assert reaches(staging, THIRD, 80)
        assert not reaches(staging, NEAR, 80)
        assert not reaches(other, NEAR, 80)
        stream = dial(app, NEAR, 80)
        await tell_groups(
            enforcer, group("public", may("tcp", f"{THIRD}", 80), running="default"), gone=("udp", "build")
        )
        assert echoes(stream), "as in the original, a group is about new flows"
        assert not reaches(app, NEAR, 80)
        assert reaches(app, THIRD, 80)
        assert not answered(app, NEAR, 8080)
        assert not reaches(staging, THIRD, 80)


async def test_containers_own_rules_hold_where_the_table_does_not(cell: Cell, kind: str) -> None:
    own, opened = may("tcp", f"{NEAR}", 80), may("tcp", f"{FAR}", 80)
    app = of(cell.box("web"), egress=(own,), opened=(opened,))
    stranger = of(cell.box("db"), space=None, egress=(own,))
    Outside([cell], 80)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        assert [reaches(app, to, 80) for to in (NEAR, FAR, THIRD)] == [True, True, False]
        await tell_groups(enforcer, group("public", may("tcp", f"{THIRD}", 80), running="default"))
        assert [reaches(app, to, 80) for to in (NEAR, FAR, THIRD)] == [False, True, True]
        assert [reaches(stranger, to, 80) for to in (NEAR, FAR, THIRD)] == [True, False, False]
        # The runtime opens something more for a container that runs.
        of(app, egress=(own,), opened=(opened, may("tcp", f"{NEAR}", 80)))
        await enforcer.reconciler.admit(app.container)
        assert [reaches(app, to, 80) for to in (NEAR, FAR, THIRD)] == [True, True, True]
        enforcer.reconciler.use_security_groups(False)
        await enforcer.settled()
        assert not reaches(app, THIRD, 80)


async def test_denied_networks_and_metadata_are_denied_whatever_groups_say(cell: Cell, kind: str) -> None:
    app, staging, task = (
        of(cell.box("web"), workload, egress=(ALL,)) for workload in (Workload.APP, Workload.STAGING, Workload.TASK)
    )
    Outside([cell], 80)
    settings = {
        "deny_networks_always": (f"{NEAR}",),
        "deny_networks_running": (f"{FAR}/32",),
        "deny_networks_staging": ("198.51.100.3/30",),
    }
    async with enforcing(cell, kind, known=KNOWN, **settings):
        for box in (app, task):
            assert [reaches(box, to, 80) for to in (NEAR, FAR, THIRD, METADATA)] == [False, False, True, False]
        assert [reaches(staging, to, 80) for to in (NEAR, FAR, THIRD, METADATA)] == [False] * 4
        assert reaches(staging, ROUTER, 80)
    async with enforcing(cell, kind, known=KNOWN, metadata_endpoints=()):
        assert [reaches(app, to, 80) for to in (NEAR, FAR, THIRD, METADATA)] == [True] * 4


async def test_only_named_services_of_the_host_are_reached(cell: Cell, kind: str) -> None:
    app = of(cell.box("web"), egress=(ALL,))
    cell.ip("addr add 169.254.0.2/32 dev lo")
    for address in ("169.254.0.2", str(cell.underlay)):
        for port in (53, 7000, 7001):
            Echo(cell, port, address)
    settings = {
        "dns_servers": (IPv4Address("169.254.0.2"), cell.underlay),
        "host_tcp_services": (f"{cell.underlay}:7000",),
        "host_udp_services": (f"{cell.underlay}:7001",),
    }
    async with enforcing(cell, kind, known=KNOWN, **settings):
        assert reaches(app, "169.254.0.2", 53)
        assert answered(app, "169.254.0.2", 53)
        assert not reaches(app, "169.254.0.2", 7000)
        assert not reaches(app, cell.underlay, 53), "not link-local, so it is not a resolver of this host's own"
        assert reaches(app, cell.underlay, 7000)
        assert not answered(app, cell.underlay, 7000)
        assert answered(app, cell.underlay, 7001)
        assert not reaches(app, cell.underlay, 7001)


async def test_forwarded_ports(two_cells: list[Cell], kind: str) -> None:
    cell, other = two_cells
    web = of(cell.box("web"), forwards=(forward(61001, 8080), forward(61002, 8081), forward(61002, 8080, "udp")))
    api, far = of(cell.box("api"), egress=(ALL,)), of(other.box("db"), egress=(ALL,))
    for port in (8080, 8081, 8082):
        web.serve(port)
    outside = Outside(two_cells)
    async with enforcing(cell, kind, known=KNOWN) as enforcer, enforcing(other, kind, known=KNOWN):
        assert outside.reaches(cell.underlay, 61001)
        assert outside.reaches(cell.underlay, 61002)
        assert not outside.reaches(cell.underlay, 61003)
        assert not outside.reaches(web.address, 8080), "not without being forwarded"
        # A container of another cell comes by the underlay, as its groups let it, under its cell's address.
        assert reaches(far, cell.underlay, 61001)
        with inside(cell.network.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.settimeout(2)
            sender.sendto(b"forwarded", (str(cell.underlay), 61002))
            assert heard(sender, b"forwarded")
        stream = dial(outside.network, cell.underlay, 61001)
        assert echoes(stream)
        # One of the same cell does not, unless a policy lets it reach the container.
        assert not reaches(api, cell.underlay, 61001)
        await enforcer.allow("api", "web", tcp(8080))
        assert reaches(api, cell.underlay, 61001)
        assert not reaches(api, cell.underlay, 61002)
        hairpin = dial(api, cell.underlay, 61001)
        assert echoes(hairpin)
        await enforcer.allow("api", "web")
        assert is_cut(hairpin)
        assert echoes(stream), "no policy let it in, so none takes it back"
        # Another port is forwarded later, and one no longer.
        of(web, forwards=(forward(61001, 8080), forward(61003, 8082)))
        await enforcer.reconciler.admit(web.container)
        assert outside.reaches(cell.underlay, 61003)
        assert not outside.reaches(cell.underlay, 61002)
        await enforcer.reconciler.sync()
        assert echoes(stream)
        await enforcer.reconciler.forget(web.container.handle)
        assert not echoes(stream)
        assert not outside.reaches(cell.underlay, 61001)


async def test_what_goes_out_has_the_cells_address_but_to_the_range_that_knows_containers(
    cell: Cell, kind: str
) -> None:
    app = of(cell.box("web"), egress=(ALL,))
    outside = Outside([cell])

    def seen(to: IPv4Address) -> IPv4Address:
        with inside(outside.network.name, lambda: socket.create_server((str(to), 4444))) as listener:
            listener.settimeout(5)
            with dial(app, to, 4444):
                connection, peer = listener.accept()
                connection.close()
                return IPv4Address(peer[0])

    async with enforcing(cell, kind, known=KNOWN):
        assert seen(NEAR) == cell.underlay
    async with enforcing(cell, kind, known=KNOWN, no_masquerade="198.51.100.0/30"):
        assert seen(NEAR) == app.address
        assert seen(ROUTER) == cell.underlay


async def test_connections_out_are_limited_each_container_to_each_place(cell: Cell, kind: str) -> None:
    app, other = (of(cell.box(None), egress=(ALL,)) for _ in range(2))
    Outside([cell], 80, 81)
    limit = {"outbound_limit": True, "outbound_burst": 5, "outbound_rate": 1}
    async with enforcing(cell, kind, known=KNOWN, **limit):
        outcome = [reaches(app, NEAR, 80) for _ in range(20)]
        assert 5 <= sum(outcome) < 20
        assert outcome[:5] == [True] * 5
        assert reaches(app, NEAR, 81)
        assert reaches(app, FAR, 80)
        assert reaches(other, NEAR, 80)
    async with enforcing(cell, kind, known=KNOWN, **limit, outbound_dry_run=True):
        assert all(reaches(app, NEAR, 80) for _ in range(20))


async def test_nobody_goes_out_under_anothers_address(cell: Cell, kind: str) -> None:
    app, other = of(cell.box("web"), egress=(may("tcp", f"{NEAR}", 80),)), of(cell.box("api"), egress=(ALL,))
    outside = Outside([cell])
    listener = inside(outside.network.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    listener.bind((str(FAR), 5000))
    listener.settimeout(1)
    strangers = (other.address, cell.subnet[99], IPv4Address("203.0.113.7"))
    app.ip(*(f"addr add {address}/32 dev eth0" for address in strangers))

    def sends(box: Box, address: IPv4Address) -> bool:
        with inside(box.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.bind((str(address), 0))
            sender.sendto(b"smuggled", (str(FAR), 5000))
        return heard(listener, b"smuggled")

    with listener:
        async with enforcing(cell, kind, known=KNOWN):
            assert sends(other, other.address)
            for address in (app.address, *strangers):
                assert not sends(app, address), address


async def test_icmp_by_type_and_code(cell: Cell, kind: str) -> None:
    allowed = {
        "any type": may("icmp", f"{NEAR}"),
        "any code": may("icmp", f"{NEAR}", icmp=(8, None)),
        "this one": may("icmp", f"{NEAR}", icmp=(8, 0)),
        "other code": may("icmp", f"{NEAR}", icmp=(8, 1)),
        "other type": may("icmp", f"{NEAR}", icmp=(13, 0)),
        "no type": may("icmp", f"{NEAR}", icmp=(254, 254)),
        "no ICMP": may("tcp", f"{NEAR}", 80),
    }
    boxes = {name: of(cell.box(None), egress=(each,)) for name, each in allowed.items()}
    Outside([cell])
    async with enforcing(cell, kind, known=KNOWN):
        assert {name for name, box in boxes.items() if pings(box, NEAR)} == {"any type", "any code", "this one"}
        assert not any(pings(box, FAR) for box in boxes.values())


def pings(box: Box, to: IPv4Address) -> bool:
    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

    with inside(box.name, make) as made:
        made.settimeout(0.5)
        made.sendto(echo(8, b"pinged"), (str(to), 0))
        try:
            while True:
                packet = made.recv(1500)
                if packet[20] == 0 and b"pinged" in packet:
                    return True
        except TimeoutError:
            return False


async def test_without_the_policy_all_containers_reach_one_another(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api, other = near.box("web"), far.box(None), near.box(None)
    for box in (web, api, other):
        box.serve(8080)
    outside = Outside(two_cells)
    open_to_all = {"disable_container_network_policy": True}
    async with enforcing(near, kind, known=KNOWN, **open_to_all), enforcing(far, kind, known=KNOWN, **open_to_all):
        for source, destination in ((web, api), (api, web), (other, web), (other, api)):
            assert source.reaches(destination, 8080)
        pretended = far.subnet[99]
        web.ip(f"addr add {pretended}/32 dev eth0")
        with pytest.raises(TimeoutError):
            web.tcp(other, 8080, source=pretended)
        assert not outside.reaches(web.address, 8080)


async def test_the_ingress_router_reaches_the_apps_ports(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web = of(near.box("web"), ports=(8080, 8082))
    plain = of(near.box("web"), ports=())
    router, db = far.box("INGRESS_ROUTER"), far.box("db")
    for port in (8080, 8081, 8082):
        web.serve(port)
        plain.serve(port)
    known = {**KNOWN, **tags(INGRESS_ROUTER=77)}
    ingress = {"enable_overlay_ingress_rules": True}
    async with enforcing(near, kind, known=known, **ingress) as enforcer, enforcing(far, kind, known=known):
        assert [router.reaches(web, port) for port in (8080, 8081, 8082)] == [True, False, True]
        assert not router.reaches(plain, 8080)
        assert not db.reaches(web, 8080)
        stream = router.tcp(web, 8080)
        await enforcer.reconciler.sync()
        await enforcer.allow("db", "web", tcp(8081))
        assert echoes(stream), "no policy lets it in, and still it is allowed"
        of(web, ports=(8082,))
        await enforcer.reconciler.admit(web.container)
        assert not router.reaches(web, 8080)
        assert not echoes(stream)
    async with enforcing(near, kind, known=known), enforcing(far, kind, known=known):
        assert not router.reaches(web, 8082)


async def test_a_machine_that_is_the_ingress_router_reaches_the_apps_ports(two_cells: list[Cell], kind: str) -> None:
    near, machine = two_cells
    web = of(near.box("web"), ports=(8080,))
    for port in (8080, 8081):
        web.serve(port)

    def through(port: int) -> bool:
        try:
            stream = dial(machine, web.address, port, source=machine.subnet[0])
        except OSError:
            return False
        with stream:
            return echoes(stream)

    known, ingress = {**KNOWN, **tags(INGRESS_ROUTER=77)}, {"enable_overlay_ingress_rules": True}
    async with enforcing(near, kind, known=known, **ingress):
        async with enforcing(machine, kind, known=known):
            assert not through(8080)
        async with enforcing(machine, kind, known=KNOWN, ingress_router=True) as router:
            assert not through(8080), "it has no tag yet"
            await router.tell(tags(INGRESS_ROUTER=77))
            assert [through(port) for port in (8080, 8081)] == [True, False]
            await router.tell({tag_key(AppId("INGRESS_ROUTER")): None})
            assert not through(8080)


FAULTS = {
    "the program refuses": rule("-m set --match-set no-such-set dst", to="ACCEPT"),
    "the kernel refuses": rule(to="MASQUERADE"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_a_rule_that_is_refused_does_not_keep_out_the_others(
    cell: Cell, kind: str, fault: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad, mixed = (
        of(cell.box(None), egress=(may("tcp", f"{NEAR}", *ports),)) for ports in ((80,), (81,), (80, 81))
    )
    Outside([cell], 80, 81)
    list_rules = egress.list_rules

    def refused(rules: egress.RuleList, *, log_all: bool = False) -> Rules:
        made = list_rules(rules, log_all=log_all)
        return (fault, *made) if (81, 81) in rules.rules[0].ports else made

    monkeypatch.setattr(egress, "list_rules", refused)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        assert reaches(good, NEAR, 80)
        assert [reaches(mixed, NEAR, 80), reaches(bad, NEAR, 81), reaches(bad, FAR, 81)] == [True, True, False]
        faults = enforcer.reconciler.faults
        assert len(faults) == 2
        assert all(f"container '{box.container.handle}'" in " ".join(faults) for box in (bad, mixed))
        assert enforcer.reconciler.problem is None
        # A change goes through, and what is refused stays out.
        late = of(cell.box(None), egress=(may("tcp", f"{FAR}", 80),))
        await enforcer.reconciler.admit(late.container)
        assert reaches(late, FAR, 80)
        assert "MASQUERADE" not in "".join(
            line for line in cell.saved(kind).splitlines() if line.startswith("-A sb-s-")
        )
    monkeypatch.undo()
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        assert enforcer.reconciler.faults == []


async def test_a_container_is_admitted_again_with_another_address(cell: Cell, kind: str) -> None:
    app = of(cell.box("web"), egress=(may("tcp", f"{NEAR}", 80),))
    Outside([cell], 80)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        assert reaches(app, NEAR, 80)
        moved = replace(app.container, address=app.cell.subnet[200])
        await enforcer.reconciler.admit(moved)
        assert not reaches(app, NEAR, 80)
        await enforcer.reconciler.forget(moved.handle)
        await until(lambda: f"{moved.address}" not in cell.saved(kind))
