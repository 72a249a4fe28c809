"""The enforcer on the real kernel, seen from inside the containers."""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from bus.messages import AppId, Handle, Revision
from bus.tables import Update
from services.enforcer import iptables
from services.enforcer.generation import nft_generation
from services.enforcer.reconciler import NotReady
from tests.enforcer.conftest import enforcing, tags, tcp, udp
from tests.enforcer.world import Cell, Echo, dial, echoes, inside, is_cut, until

pytestmark = pytest.mark.kernel
KNOWN = tags(web=1, api=0x1234, db=3)


async def quiet(cell: Cell, kind: str) -> str:
    """The rules with their counters, once the last packets of connections that were closed are through."""
    saved, later = "", cell.saved(kind, counters=True)
    while saved != later:
        await asyncio.sleep(1)
        saved, later = later, cell.saved(kind, counters=True)
    return saved


async def test_nothing_passes_until_a_policy_says_so(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    api.serve(8081)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        assert not web.reaches(api, 8080)
        await enforcer.allow("web", "api", tcp(8080))
        assert web.reaches(api, 8080)
        assert not web.reaches(api, 8081)
        assert not echoes(web.udp(api, 8080))
        assert not api.reaches(web, 8080)
        await enforcer.allow("web", "api", udp(8080, 8090))
        assert not web.reaches(api, 8080)
        assert echoes(web.udp(api, 8081))


async def test_across_cells_the_tag_travels(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, other, api = near.box("web"), near.box("db"), far.box("api")
    api.serve(8080)
    async with enforcing(near, kind, known=KNOWN), enforcing(far, kind, known=KNOWN) as enforcer:
        assert not web.reaches(api, 8080)
        await enforcer.allow("web", "api", tcp(8080), udp(8080))
        assert web.reaches(api, 8080)
        assert not other.reaches(api, 8080)
        stream, datagrams = web.tcp(api, 8080), web.udp(api, 8080)
        assert echoes(stream)
        assert echoes(datagrams)
        await enforcer.allow("web", "api")
        assert is_cut(stream)
        assert is_cut(datagrams)
        assert not web.reaches(api, 8080)


async def test_a_removed_policy_cuts_what_no_other_allows(cell: Cell, kind: str) -> None:
    web, db, api = cell.box("web"), cell.box("db"), cell.box("api")
    api.serve(8080)
    api.serve(9090)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        await enforcer.allow("web", "api", tcp(8080), udp(8080), tcp(9090))
        await enforcer.allow("db", "api", tcp(8080))
        stream, datagrams, kept, others = web.tcp(api, 8080), web.udp(api, 8080), web.tcp(api, 9090), db.tcp(api, 8080)
        for flow in (stream, datagrams, kept, others):
            assert echoes(flow)
        # Narrower, but 8080 is still within it: nothing is cut.
        await enforcer.allow("web", "api", tcp(8000, 8100), udp(8080), tcp(9090))
        for flow in (stream, datagrams, kept, others):
            assert echoes(flow)
        await enforcer.allow("web", "api", tcp(9090))
        assert is_cut(stream)
        assert is_cut(datagrams)
        assert echoes(kept)
        assert echoes(others)
        await enforcer.allow("web", "api", udp(8080))
        assert echoes(datagrams), "a flow that is allowed again lives again"
        assert is_cut(kept)


async def test_a_server_cannot_keep_a_cut_flow_alive(two_cells: list[Cell], kind: str) -> None:
    """The measured trap: the server's next packet must not make a reversed flow."""
    near, far = two_cells
    web, api = near.box("web"), far.box("api")
    server = api.serve(8080)
    async with enforcing(near, kind, known=KNOWN), enforcing(far, kind, known=KNOWN) as enforcer:
        await enforcer.allow("web", "api", udp(8080))
        datagrams = web.udp(api, 8080)
        assert echoes(datagrams)
        peer = datagrams.getsockname()
        await enforcer.allow("web", "api")
        datagrams.settimeout(0.3)
        for _ in range(3):
            with suppress(ConnectionRefusedError):
                server.datagram.sendto(b"unasked", peer)
            with pytest.raises((TimeoutError, ConnectionRefusedError)):
                datagrams.recv(16)


async def test_applying_twice_changes_nothing(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known) as enforcer:
        assert web.reaches(api, 8080)
        stream = web.tcp(api, 8080)
        before = await quiet(cell, kind)
        assert "sb-a-" in before
        await enforcer.allow("web", "api", tcp(8080))
        await enforcer.reconciler.sync()
        assert cell.saved(kind, counters=True) == before
    async with enforcing(cell, kind, known=known):
        assert cell.saved(kind, counters=True) == before
    assert echoes(stream)


async def test_a_restart_neither_opens_nor_cuts(cell: Cell, kind: str) -> None:
    web, db, api = cell.box("web"), cell.box("db"), cell.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known):
        stream = web.tcp(api, 8080)
    # Nobody is there: the kernel goes on.
    assert echoes(stream)
    assert web.reaches(api, 8080)
    assert not db.reaches(api, 8080)
    async with enforcing(cell, kind, begin=False):
        assert echoes(stream)
        assert web.reaches(api, 8080)
        assert not db.reaches(api, 8080)
    # While it was away the policy went: the flow is cut at start.
    async with enforcing(cell, kind, known=KNOWN):
        assert is_cut(stream)
        assert not web.reaches(api, 8080)


async def test_the_fence_stands_before_anything_is_known(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    assert web.reaches(api, 8080)
    async with enforcing(cell, kind, begin=False):
        assert not web.reaches(api, 8080)
        assert "-i s-+" in cell.exec(f"ip6tables-{kind}-save -t filter")


async def test_a_container_comes_and_goes(cell: Cell, kind: str) -> None:
    web = cell.box("web")
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080), udp(8080))}
    async with enforcing(cell, kind, known=known) as enforcer:
        api = cell.box("api")
        api.serve(8080)
        assert not web.reaches(api, 8080)
        await enforcer.reconciler.admit(api.container)
        await enforcer.reconciler.admit(api.container)
        assert web.reaches(api, 8080)
        datagrams = web.udp(api, 8080)
        assert echoes(datagrams)
        await enforcer.reconciler.forget(api.container.handle)
        await enforcer.reconciler.forget(Handle("nobody"))
        assert not web.reaches(api, 8080)
        assert not echoes(datagrams)
        await until(lambda: cell.saved(kind).count(":sb-a-") == 1)
        assert str(api.address) not in cell.exec("ipset save sb-tag")


async def test_foreign_rules_survive(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    cell.exec(
        f"iptables-{kind}-restore --noflush",
        '*filter\n:KUBE-X - [0:0]\n-A FORWARD -j KUBE-X\n-A KUBE-X -s 1.2.3.4 -m comment --comment "a: b" -j DROP\n'
        "-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n*raw\n-A PREROUTING -s 9.9.9.9 -j DROP\nCOMMIT\n",
    )
    foreign = set(cell.saved(kind).splitlines())
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known) as enforcer:
        await enforcer.allow("web", "api")
        await enforcer.allow("web", "api", tcp(8080))
        await enforcer.reconciler.sync()
        assert foreign <= set(cell.saved(kind).splitlines())
        # Somebody puts a rule before ours: ours are first again after the next look.
        cell.exec(f"iptables-{kind} -w -I FORWARD 1 -j ACCEPT")
        cell.exec(f"iptables-{kind} -w -F sb-forward")
        await enforcer.reconciler.sync()
        forward = [line for line in cell.saved(kind).splitlines() if line.startswith("-A FORWARD")]
        assert ["sb-forward" in line for line in forward[:6]] == [True] * 4 + [False] * 2
        assert web.reaches(api, 8080)
        assert foreign <= set(cell.saved(kind).splitlines())


async def test_a_spoofed_source_is_dropped(cell: Cell, kind: str) -> None:
    web, db, api = cell.box("web"), cell.box("db"), cell.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known):
        db.ip(f"addr add {web.address}/32 dev lo")
        with pytest.raises(TimeoutError):
            db.tcp(api, 8080, source=web.address)
        assert web.reaches(api, 8080)


async def test_the_host_is_out_of_reach_but_reaches_containers(cell: Cell, kind: str) -> None:
    web = cell.box("web")
    web.serve(8080)
    Echo(cell, 22)
    assert echoes(dial(web, "169.254.0.1", 22))
    async with enforcing(cell, kind, known=KNOWN):
        with pytest.raises(ConnectionRefusedError):
            dial(web, "169.254.0.1", 22)
        assert echoes(dial(cell, web.address, 8080))


async def test_vxlan_only_from_holders_of_leases(two_cells: list[Cell], kind: str) -> None:
    near, far = two_cells
    web, api = far.box("web"), near.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(far, kind, known=known), enforcing(near, kind, known=known) as enforcer:
        assert web.reaches(api, 8080)
        enforcer.reconciler.update_leases(Update(Revision(2), {("10.255.2.0/24",): None}))
        await enforcer.settled()
        with pytest.raises(TimeoutError):
            web.tcp(api, 8080, source=web.address)


async def test_a_container_that_went_unseen_leaves_no_flows(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (udp(8080),)}
    async with enforcing(cell, kind, known=known):
        datagrams = web.udp(api, 8080)
        assert echoes(datagrams)
        assert str(api.address) in cell.exec("conntrack -L -p udp")
    cell.boxes.remove(api)
    async with enforcing(cell, kind, known=known):
        assert str(api.address) not in cell.exec("conntrack -L -p udp")
    api.close()


async def test_an_address_that_passes_to_another_app_keeps_no_flows(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known) as enforcer:
        stream = web.tcp(api, 8080)
        assert echoes(stream)
        await enforcer.reconciler.admit(replace(api.container, app=AppId("db")))
        assert is_cut(stream)


async def test_what_somebody_changed_is_repaired_unasked(cell: Cell) -> None:
    cell.box("web")
    cell.box("api")
    known = {**KNOWN, ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(cell, "nft", known=known) as enforcer:
        await enforcer.allow("api", "web", tcp(80))
        assert inside(cell.name, nft_generation) is not None
        assert not await enforcer.kernel.run(enforcer.reconciler._dataplane.doubtful), "our own writes are no drift"
        before = cell.saved("nft")
        cell.exec("iptables-nft -F sb-forward")
        cell.exec("iptables-nft -D FORWARD 1")
        cell.exec("iptables-nft -t raw -F PREROUTING")
        await until(lambda: cell.saved("nft") == before)


async def test_our_leftovers_of_the_other_kind_are_taken_out(cell: Cell, kind: str) -> None:
    other = "legacy" if kind == "nft" else "nft"
    cell.box("web")
    cell.exec(f"iptables-{other} -A FORWARD -s 1.2.3.4 -j DROP")
    async with enforcing(cell, other, known=KNOWN):
        pass
    async with enforcing(cell, kind, known=KNOWN):
        await until(lambda: "sb-" not in cell.saved(other))
    assert "-A FORWARD -s 1.2.3.4/32 -j DROP" in cell.saved(other)


async def test_a_kernel_that_refuses_is_reported_and_tried_again(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    async with enforcing(cell, "nft", known=KNOWN) as enforcer:
        monkeypatch.setattr(iptables, "LOCK_WAIT", -1)
        with pytest.raises(NotReady, match="iptables-nft-restore: exit"):
            await enforcer.allow("web", "api", tcp(8080))
        assert enforcer.reconciler.problem is not None
        monkeypatch.undo()
        await until(lambda: enforcer.reconciler.problem is None)
        assert web.reaches(api, 8080)
