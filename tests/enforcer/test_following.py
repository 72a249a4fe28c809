"""When the table of security groups counts on a cell: real replicas, tables in SQL, and a real bus."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from bus.connection import connect
from bus.database_options import DatabaseOptions
from bus.messages import Container, Handle, Stage, Workload
from bus.process import KernelThread
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SecurityGroup, SpaceId
from bus.tables import SECURITY_GROUPS, Publisher, Replica
from services.enforcer import following
from services.enforcer.reconciler import Reconciler
from services.enforcer.settings import EnforcerSettings
from services.policy import security_groups
from services.policy.migrate import open_ledger, security_groups_ledger
from services.policy.security_groups import SecurityGroups
from tests.bus.tables import eventually
from tests.nats_server import NatsServer

RULE = EgressRule(EgressProtocol.ALL, (AddressRange.parse("1.2.3.4"),))
OWN = EgressRule(EgressProtocol.ALL, (AddressRange.parse("5.6.7.8"),))
APP = Container(Handle("c"), "/n", Stage.READY, workload=Workload.APP, space=SpaceId("s"), egress=(OWN,))


@asynccontextmanager
async def centre(bus: NatsServer, folder: Path) -> AsyncIterator[SecurityGroups]:
    async with (
        open_ledger(f"sqlite:///{folder / 'p.db'}", DatabaseOptions()) as policies,
        connect(bus.url, role="policy-server", name="p") as connection,
    ):
        ledger = security_groups_ledger(policies)
        publisher = Publisher(connection, ledger, SECURITY_GROUPS, security_groups.entries)
        task = asyncio.create_task(publisher.run())
        yield SecurityGroups(ledger, publisher.committed)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Cell:
    """What an enforcer knows of groups, without its kernel."""

    def __init__(self, reconciler: Reconciler, replica: Replica[SecurityGroup], waited: float) -> None:
        self.reconciler, self.replica, self.waited = reconciler, replica, waited

    @property
    def reach(self) -> set[str]:
        lists = self.reconciler.model.security_groups.reach(APP).lists
        return {str(to) for each in lists for rule in each.rules for to in rule.destinations}


@asynccontextmanager
async def cell(bus: NatsServer, folder: Path, *, max_stale: float = 3600.0) -> AsyncIterator[Cell]:
    reconciler = Reconciler(EnforcerSettings(cell="one", state_dir=folder), KernelThread("none"))
    async with connect(bus.url, role="cell", name="one") as connection:
        replica = Replica(connection, SECURITY_GROUPS, cache=folder / "g.table", max_stale=max_stale, patience=1)
        replica.listen(reconciler.update_security_groups)
        running = asyncio.create_task(replica.run())
        began = time.monotonic()
        await following.first(replica, reconciler)
        waited = time.monotonic() - began
        watching = asyncio.create_task(following.follow(replica, reconciler))
        yield Cell(reconciler, replica, waited)
        for task in (running, watching):
            task.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)


async def test_the_table_counts_once_it_was_written_and_while_it_is_not_too_old(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    group = SecurityGroup(GroupId("g"), "public", (RULE,), running_default=True)
    async with cell(nats_server, tmp_path / "apart") as here:
        assert here.waited < following.MOMENT + 5
        assert here.reach == {"5.6.7.8"}, "nobody has such a table"
    async with centre(nats_server, tmp_path) as groups, cell(nats_server, tmp_path) as here:
        await eventually(lambda: str(here.replica.state) == "live", 30)
        await asyncio.sleep(2 * following.INTERVAL)
        assert here.reach == {"5.6.7.8"}, "there is one, to which nobody ever wrote"
        await groups.replace({GroupId("g"): group}, actor="test")
        await eventually(lambda: here.reach == {"1.2.3.4"}, 30)
        await groups.replace({}, actor="test")
        await eventually(lambda: here.reach == set(), 30)
        await groups.replace({GroupId("g"): group}, actor="test")
        await eventually(lambda: here.reach == {"1.2.3.4"}, 30)
        await asyncio.sleep(0.5)  # it is kept on disk
    async with cell(nats_server, tmp_path) as here:
        await eventually(lambda: here.reach == {"1.2.3.4"}, 30)
        assert str(here.replica.state) == "cached"
    async with cell(nats_server, tmp_path, max_stale=0.001) as here:
        await eventually(lambda: str(here.replica.state) == "degraded", 30)
        await asyncio.sleep(2 * following.INTERVAL)
        assert here.reach == {"5.6.7.8"}
