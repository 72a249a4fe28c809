"""A reconciler in a cell's namespace, fed directly: what the replicas would tell it, the tests do."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import netns

from bus.messages import AppId, CellName, Lease, Ports, Protocol, Revision, lease_key, policy_key, tag_key
from bus.process import KernelThread
from bus.tables import Update
from services.enforcer.reconciler import Reconciler
from services.enforcer.settings import EnforcerSettings
from tests.enforcer.world import Cell, cells


@pytest.fixture(params=["nft", "legacy"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The xtables lock is a file of the machine's: ours must not hold up anybody's, nor theirs ours."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))


@pytest.fixture
def cell() -> Iterator[Cell]:
    with cells(1) as made:
        yield made[0]


@pytest.fixture
def two_cells() -> Iterator[list[Cell]]:
    with cells(2) as made:
        yield made


def tcp(start: int, end: int | None = None) -> Ports:
    return Ports(Protocol.TCP, start, end or start)


def udp(start: int, end: int | None = None) -> Ports:
    return Ports(Protocol.UDP, start, end or start)


class Enforcer:
    """One reconciler, and what it was told."""

    def __init__(self, cell: Cell, reconciler: Reconciler, kernel: KernelThread) -> None:
        self.cell = cell
        self.reconciler = reconciler
        self.kernel = kernel
        self._revision = 0

    async def tell(self, changes: dict[tuple[str, ...], object]) -> None:
        """A revision of the policies table; returns when the kernel has it."""
        self._revision += 1
        self.reconciler.update_policies(Update(Revision(self._revision), changes))  # type: ignore[arg-type]
        await self.settled()

    async def allow(self, source: str, destination: str, *ports: Ports) -> None:
        await self.tell({policy_key(AppId(destination), AppId(source)): ports or None})

    async def settled(self) -> None:
        await self.reconciler._applied()


def tags(**given: int) -> dict[tuple[str, ...], object]:
    return {tag_key(AppId(app)): tag for app, tag in given.items()}


@asynccontextmanager
async def enforcing(
    cell: Cell, kind: str, *, known: dict[tuple[str, ...], object] | None = None, begin: bool = True, **more: Any
) -> AsyncIterator[Enforcer]:
    """An enforcer on a cell, in sync with `known` policies and tags and with all cells' leases; `more` settings."""
    settings = EnforcerSettings(cell=f"cell-{cell.number}", iptables=kind, state_dir=Path(os.devnull), **more)
    kernel = KernelThread("kernel")
    await kernel.run(netns.setns, cell.name)
    reconciler = Reconciler(settings, kernel)
    enforcer = Enforcer(cell, reconciler, kernel)
    await reconciler.open()
    reconciler.restore([box.container for box in cell.boxes])
    task = asyncio.create_task(reconciler.run())
    try:
        if begin:
            reconciler.update_leases(Update(Revision(1), leases()))
            if known:
                enforcer._revision = 1
                reconciler.update_policies(Update(Revision(1), known))  # type: ignore[arg-type]
            reconciler.begin()
            await enforcer.settled()
        yield enforcer
    finally:
        if task.done():
            task.result()
        task.cancel()
        kernel.close()


def leases() -> dict[tuple[str, ...], Lease | None]:
    """Cells 1 and 2 hold leases."""
    from ipaddress import IPv4Address, IPv4Network

    made = {}
    for number in (1, 2):
        subnet = IPv4Network(f"10.255.{number}.0/24")
        lease = Lease(subnet, CellName(f"cell-{number}"), IPv4Address(f"10.77.0.{number}"), "ee:ee:0a:ff:01:00")
        made[lease_key(subnet)] = lease
    return made
