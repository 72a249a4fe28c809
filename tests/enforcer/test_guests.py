"""Containers that another CNI plugin attached: the same fence, tags, policies and egress as our own."""

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from services.enforcer.reconciler import NotReady
from services.enforcer.rules import GUESTS
from tests.enforcer.conftest import enforcing, tags, tcp
from tests.enforcer.outside import NEAR, Outside, attach_foreign, forward, may, of, reaches
from tests.enforcer.world import Cell, Echo, run

pytestmark = pytest.mark.kernel
KNOWN = tags(web=1, api=0x1234, db=3)


@pytest.mark.parametrize("bridge", [None, "cni0"])
async def test_links_of_other_plugins_are_as_ours(two_cells: list[Cell], kind: str, bridge: str | None) -> None:
    near, far = two_cells
    near._box_numbers = iter([2, 17])  # the bridge's network is the first /28
    guest = of(near.box("web"), egress=(may("tcp", f"{NEAR}", 80),), forwards=(forward(61001, 8080),))
    own, remote = of(near.box("api")), of(far.box("db"))
    if bridge is not None:
        near.ip(f"link add {bridge} type bridge", f"link set {bridge} up", f"addr add 10.255.1.1/28 dev {bridge}")
        guest.ip("addr flush dev eth0", f"addr add {guest.address}/28 dev eth0", "route add default via 10.255.1.1")
    attach_foreign(near, guest, "veth4711", bridge)
    for box in (guest, own, remote):
        box.serve(8080)
    Echo(near, 22)
    outside = Outside(two_cells, 80, 81)
    async with enforcing(near, kind, known=KNOWN) as enforcer, enforcing(far, kind, known=KNOWN) as other:
        # The fence.
        assert not guest.reaches(own, 8080)
        assert not own.reaches(guest, 8080)
        assert not guest.reaches(remote, 8080)
        assert not reaches(guest, near.underlay, 22)
        assert not outside.reaches(guest.address, 8080)
        # Policies, tags, egress and forwarding.
        await enforcer.allow("web", "api", tcp(8080))
        await enforcer.allow("api", "web", tcp(8080))
        await other.allow("web", "db", tcp(8080))
        assert guest.reaches(own, 8080)
        assert own.reaches(guest, 8080)
        assert guest.reaches(remote, 8080)
        assert reaches(guest, NEAR, 80)
        assert not reaches(guest, NEAR, 81)
        assert outside.reaches(near.underlay, 61001)
        # Another source address.
        pretended = IPv4Address("10.255.1.77")
        guest.ip(f"addr add {pretended}/32 dev eth0")
        near.ip(f"route add {pretended}/32 dev lo")
        with pytest.raises(TimeoutError):
            guest.tcp(own, 8080, source=pretended)
        # A link made anew has no group; the next look at everything finds it.
        run(f"ip -n {near.name} link set {bridge or guest.link} group 0")
        await enforcer.reconciler.sync()
        assert f"group {GUESTS}" in run(f"ip -n {near.name} -d link show {bridge or guest.link}")


async def test_the_hosts_own_uplink_is_never_taken_for_a_containers(cell: Cell, kind: str) -> None:
    """As with macvlan or host-device: the address is reached by the uplink, whose fence would cut the host off."""
    Outside([cell])
    near = of(cell.box("web"))
    cell.ip(f"link del {near.link}")
    before = run(f"ip -n {cell.name} -d link show under")
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        with pytest.raises(NotReady, match=r"under, which is no container's link; use a CNI plugin"):
            await enforcer.reconciler.admit(replace(near.container, interface=None))
        assert any(str(near.address) in fault for fault in enforcer.reconciler.faults)
        assert enforcer.reconciler.problem is None
        # Its plugin makes the link after all.
        cell.ip("link add veth1 type veth peer name veth2", "link set veth1 up", f"route add {near.address} dev veth1")
        await enforcer.reconciler.admit(replace(near.container, interface=None))
        assert enforcer.reconciler.faults == []
        await enforcer.reconciler.forget(near.container.handle)
    assert run(f"ip -n {cell.name} -d link show under") == before


async def test_rules_for_them_come_with_the_first_and_go_with_the_last(cell: Cell, kind: str) -> None:
    """A restart, too, knows of them only by those that it is told of."""
    own = cell.box("api")
    own.serve(8080)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        assert "devgroup" not in cell.saved(kind).split("*filter")[1].split("COMMIT")[0]
        guest = cell.box("web")
        attach_foreign(cell, guest, "veth4711")
        await enforcer.reconciler.admit(guest.container)
        assert not guest.reaches(own, 8080)
        await enforcer.allow("web", "api", tcp(8080))
        assert guest.reaches(own, 8080)
    async with enforcing(cell, kind, begin=False):
        guest.serve(9090)
        assert not own.reaches(guest, 9090)
        assert "--src-group 0x7362" in cell.saved(kind)
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        assert not guest.reaches(own, 8080)
        await enforcer.reconciler.forget(guest.container.handle)
        cell.boxes.remove(guest)
        assert "--src-group 0x7362" not in cell.saved(kind).split("*filter")[1].split("COMMIT")[0]
        guest.close()
