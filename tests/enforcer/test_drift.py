"""What somebody else does to rules and sets of ours is noticed long before the full look each minute, and put right."""

import time
from collections.abc import Callable

import pytest

from services.enforcer.reconciler import DRIFT
from tests.enforcer.conftest import Enforcer, enforcing, tags, tcp
from tests.enforcer.world import Cell, until

pytestmark = pytest.mark.kernel
KNOWN = {**tags(web=1, api=0x1234), ("policy", "api", "web"): (tcp(8080),)}
FOREIGN = "-A FORWARD -s 1.2.3.4/32 -j DROP"


def state(cell: Cell, kind: str) -> str:
    members = sorted(line for line in cell.exec("ipset save").splitlines() if line.startswith("add"))
    return "\n".join([cell.saved(kind), *members])


async def repaired(enforcer: Enforcer, kind: str, damage: Callable[[], object]) -> None:
    """After the damage all is as before, and counted; and then there is no doubt left."""
    before, counted = state(enforcer.cell, kind), DRIFT._value.get()
    damage()
    assert state(enforcer.cell, kind) != before
    await until(lambda: state(enforcer.cell, kind) == before)
    await until(lambda: DRIFT._value.get() > counted)
    assert not await enforcer.kernel.run(enforcer.reconciler._dataplane.doubtful)


async def test_whatever_is_changed_is_put_right(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    tables = f"iptables-{kind}"
    cell.exec(f"{tables} -w {FOREIGN}")
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        await enforcer.allow("api", "web", tcp(80))
        assert not await enforcer.kernel.run(enforcer.reconciler._dataplane.doubtful), "our own writes are no drift"
        save = cell.exec(f"{tables}-save")
        await enforcer.allow("api", "web", tcp(81))

        def rules(*commands: str) -> Callable[[], object]:
            return lambda: [cell.exec(f"{tables} -w {command}") for command in commands]

        for damage in (
            rules("-D sb-forward 1"),
            rules(f"-D {FOREIGN[3:]}", f"-I {FOREIGN[3:]}".replace("FORWARD", "FORWARD 1"), "-t raw -F PREROUTING"),
            rules("-R sb-forward 1 -j ACCEPT"),  # leaves the count as it is
            rules("-F sb-forward", "-t mangle -F"),
            lambda: cell.exec(f"{tables}-restore", save),
            lambda: cell.exec(f"ipset -exist add sb-tag {web.address} skbmark 0x1234"),
            lambda: [cell.exec(f"ipset {command}") for command in ("flush sb-peers", "add sb-tag 10.255.1.99")],
        ):
            await repaired(enforcer, kind, lambda damage=damage: damage())  # type: ignore[misc]
        assert FOREIGN in cell.saved(kind)
        assert web.reaches(api, 8080)
        # The whole table, foreign rules too, replaced by nothing.
        cell.exec(f"{tables}-restore", "*filter\nCOMMIT\n")
        await until(lambda: ":sb-forward" in cell.saved(kind) and not api.reaches(web, 80))
        assert web.reaches(api, 8080)


async def test_what_others_do_beside_ours_is_left_alone_and_not_counted(cell: Cell, kind: str) -> None:
    cell.box("web")
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        counted = DRIFT._value.get()
        cell.exec(f"iptables-{kind} -w -N KUBE")
        cell.exec(f"iptables-{kind} -w -A KUBE -s 1.2.3.4 -j DROP")
        cell.exec(f"iptables-{kind} -w {FOREIGN}")
        started = time.monotonic()
        while await enforcer.kernel.run(enforcer.reconciler._dataplane.doubtful):
            assert time.monotonic() < started + 10, "after one look what others have is known"
            await enforcer.settled()
        assert FOREIGN in cell.saved(kind)
        assert DRIFT._value.get() == counted


async def test_a_set_emptied_just_after_it_was_filled_is_noticed(cell: Cell, kind: str) -> None:
    """It is then as it was before we filled it."""
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    known = {**tags(web=1, api=2), ("policy", "api", "web"): (tcp(8080),)}
    async with enforcing(cell, kind, known=known):
        cell.exec("ipset flush sb-tag")
        await until(lambda: "skbmark" in cell.exec("ipset list sb-tag").split("Members")[1])
        assert web.reaches(api, 8080)
