"""Leases as a state machine: whatever cells do in whatever order, through two controllers, on a clock that goes on.

The model knows when each cell renewed and each subnet was freed, by its own clock. Real time passes, too, a few seconds
a run; so nothing is asserted within SLACK of a limit.
"""

import asyncio
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from bus.database import open_database
from bus.ledger import Ledger, Outcome
from bus.messages import CellName, Lease
from bus.tables.table import Key
from bus.wire import pack
from services.silk.expiry import end_expired
from services.silk.leases import LeaseLost, LeaseRefused, LeaseStore, Terms
from services.silk.pool import Kind, Pool
from services.silk.schema import MIGRATIONS
from services.silk.subnets import derived_cell
from tests.databases import EmptyDatabase
from tests.silk.controller.conftest import EXPIRY, REST, pass_time, table

NETWORKS = (IPv4Network("10.255.0.0/28"), IPv4Network("10.9.0.0/29"))
"""Blocks of /30: three and one; three singles each."""
LENGTH = 30
SLACK = 40
CELLS = st.integers(1, 6)
KINDS = st.sampled_from(Kind)
STEPS = st.sampled_from([REST - 50, REST + 50, EXPIRY // 2, EXPIRY + 50])


class Leases(RuleBasedStateMachine):
    """`held`: each cell's lease, and when it was renewed. `freed`: who had a subnet last, and since when it is free.

    A cell that tells no name is not known to be the one that had a subnet under its own; the other way round it is.
    """

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.held: dict[int, tuple[Lease, int]] = {}
        self.freed: dict[IPv4Network, tuple[CellName, int, int]] = {}
        self.now = 0
        self.mirror: dict[Key, bytes] = {}
        self.runner.run(self._open())

    async def _open(self) -> None:
        self.context = open_database(self.url)
        self.database = await self.context.__aenter__()
        ledger = Ledger(self.database, "leases")
        await ledger.migrate(MIGRATIONS)
        for name in ("leases", "former_leases", "change_log"):
            await self.database.execute(f"DELETE FROM {name}")  # noqa: S608
        await self.database.execute("UPDATE table_head SET revision = 0")
        terms = Terms(Pool(NETWORKS, LENGTH), EXPIRY, REST)
        self.stores = [LeaseStore(Ledger(self.database, "leases"), terms, self._committed) for _ in range(2)]

    def teardown(self) -> None:
        self.runner.run(self.context.__aexit__(None, None, None))
        self.runner.close()

    def _committed(self, outcome: Outcome[Any]) -> None:
        """What a replica makes of it."""
        for key, value in outcome.changes:
            if value is None:
                self.mirror.pop(key, None)
            else:
                self.mirror[key] = value

    def _store(self, number: int) -> LeaseStore:
        return self.stores[number % 2]

    def _lease(self, number: int) -> Lease | None:
        return self.held[number][0] if number in self.held else None

    def _free(self, number: int) -> None:
        lease, _ = self.held.pop(number)
        self.freed[lease.subnet] = lease.cell, number, self.now

    @rule(number=CELLS, kind=KINDS, by_address=st.booleans())
    def acquire(self, number: int, kind: Kind, by_address: bool) -> None:
        had = self._lease(number)
        name = derived_cell(IPv4Address(f"10.0.0.{number}")) if by_address else CellName(f"cell-{number}")
        if by_address and had is not None:
            name = had.cell
        store, underlay = self._store(number), IPv4Address(f"10.0.0.{number}")
        try:
            if by_address:
                outcome = self.runner.run(store.acquire_at(underlay, kind))
            else:
                outcome = self.runner.run(store.acquire(name, underlay, kind))
        except LeaseRefused:
            assert had is None or store.terms.pool.kind_of(had.subnet) is not kind, "what it had was there to be given"
            others = {lease.subnet for other, (lease, _) in self.held.items() if other != number}
            may = [
                subnet
                for subnet in store.terms.pool.subnets(kind)
                if subnet not in others and not self._rests_for(subnet, name, number, REST + SLACK)
            ]
            assert not may, "a free subnet was refused"
            return
        lease = outcome.result
        assert lease is not None
        assert lease.underlay == underlay
        assert store.terms.pool.kind_of(lease.subnet) is kind
        if had is not None and store.terms.pool.kind_of(had.subnet) is kind:
            assert lease.subnet == had.subnet, "a cell keeps its subnet"
        else:
            assert not self._rests_for(lease.subnet, name, number, REST - SLACK), (
                "a subnet rests before another gets it"
            )
            if had is not None:
                self._free(number)
        self.freed.pop(lease.subnet, None)
        self.held[number] = lease, self.now

    def _rests_for(self, subnet: IPv4Network, name: CellName, number: int, rest: int) -> bool:
        owner, _, since = self.freed.get(subnet, (name, number, 0))
        return owner not in (name, derived_cell(IPv4Address(f"10.0.0.{number}"))) and self.now < since + rest

    @precondition(lambda self: self.held)
    @rule(data=st.data(), adopt=st.booleans())
    def renew(self, data: st.DataObject, adopt: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        lease, _ = self.held[number]
        revision = self.runner.run(self.stores[0].ledger.head())
        self.runner.run(self._store(number + 1).renew(lease, adopt=adopt))
        assert self.runner.run(self.stores[0].ledger.head()) == revision
        self.held[number] = lease, self.now

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def renew_what_ended(self, data: st.DataObject) -> None:
        """It is lost, unless it expired and nobody else has it."""
        subnet = data.draw(st.sampled_from(sorted(self.freed)))
        _, number, _ = self.freed[subnet]
        rows = self.runner.run(
            self.database.fetch_all("SELECT cell, expired FROM former_leases WHERE subnet = :s", {"s": str(subnet)})
        )
        (row,) = rows
        mac = "ee:ee:" + subnet.network_address.packed.hex(":")
        lease = Lease(subnet, CellName(row["cell"]), IPv4Address(f"10.0.0.{number}"), mac)
        try:
            self.runner.run(self._store(number).renew(lease))
        except LeaseLost:
            assert not row["expired"] or number in self.held
            return
        assert row["expired"]
        assert number not in self.held
        del self.freed[subnet]
        self.held[number] = lease, self.now

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        self.runner.run(self._store(number).release(self.held[number][0]))
        self._free(number)

    @rule(seconds=STEPS)
    def time_passes(self, seconds: int) -> None:
        self.runner.run(pass_time(self.database, seconds))
        self.now += seconds

    @rule()
    def expire(self) -> None:
        ended = self.runner.run(end_expired(self.stores[0], "test")).result or []
        for lease in ended:
            (number,) = [number for number, (held, _) in self.held.items() if held == lease]
            assert self.now >= self.held[number][1] + EXPIRY, "nothing ends before its time"
            self._free(number)
        late = [number for number, (_, renewed) in self.held.items() if self.now > renewed + EXPIRY]
        assert not late, "all that is due ends"

    @rule()
    def restart(self) -> None:
        terms = self.stores[0].terms
        self.stores = [LeaseStore(Ledger(self.database, "leases"), terms, self._committed) for _ in range(2)]

    @invariant()
    def nobody_shares(self) -> None:
        leases = [lease for lease, _ in self.held.values()]
        assert not any(one.subnet.overlaps(other.subnet) for one in leases for other in leases if one is not other)

    @invariant()
    def cells_replicas_and_sql_agree(self) -> None:
        entries = self.runner.run(table(self.stores[0]))
        assert entries == {(str(lease.subnet),): lease.encode() for lease, _ in self.held.values()}
        assert {key: pack(value) for key, value in entries.items()} == self.mirror


@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
def test_leases_by_any_order_of_calls(database: EmptyDatabase) -> None:
    machine = type("LeasesHere", (Leases,), {"url": database.url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25 if database.kind == "sqlite" else 12,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
