"""Policies and tags against a plain model, on a real database, with transactions that are made to run twice."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.database import open_database
from bus.ledger import Change, Ledger, Outcome
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy.schema import MIGRATIONS
from services.policy.store import Filter, Store, entries
from services.policy.tag_pool import TagPool, TagsExhausted

REST = 100
TAGS = 4


class FailingOnce(Ledger):
    """A ledger whose database, when told so, goes away once after all statements ran, before the commit."""

    fail_next = False

    async def change(
        self, work: Callable[[Change], Awaitable[Any]], *, actor: str, request_id: str | None = None
    ) -> Outcome[Any]:
        async def flaky(change: Change) -> Any:
            result = await work(change)
            if self.fail_next:
                self.fail_next = False
                raise ConnectionResetError("the database went away")
            return result

        return await super().change(flaky, actor=actor, request_id=request_id)


@dataclass
class Bench:
    """A store with a clock to be turned, and what it said it committed."""

    store: Store
    ledger: FailingOnce
    now: list[float]
    outcomes: list[Outcome[None]]

    async def table(self) -> dict[tuple[str, ...], Any]:
        async with self.ledger.database.connection() as connection:
            return dict(await entries(connection))


@asynccontextmanager
async def bench(folder: Path, *, highest: int = 65535) -> AsyncIterator[Bench]:
    async with bench_on(f"sqlite:///{folder / 'policy.db'}", highest=highest) as made:
        yield made


@asynccontextmanager
async def bench_on(url: str, *, highest: int = 65535) -> AsyncIterator[Bench]:
    async with open_database(url) as database:
        ledger = FailingOnce(database, "policies")
        await ledger.migrate(MIGRATIONS)
        now, outcomes = [1_000_000.5], list[Outcome[None]]()
        pool = TagPool(rest=REST, clock=lambda: now[0], highest=highest)
        yield Bench(Store(ledger, pool, outcomes.append), ledger, now, outcomes)


@dataclass
class Model:
    """What should be there, in the plainest terms."""

    policies: list[Policy] = field(default_factory=list)
    used: dict[AppId, int] = field(default_factory=dict)
    freed: dict[AppId, tuple[float, int]] = field(default_factory=dict)

    def apps(self) -> set[AppId]:
        return {app for policy in self.policies for app in (policy.source, policy.destination)}

    def create(self, policies: Iterable[Policy]) -> None:
        self.policies += [policy for policy in dict.fromkeys(policies) if policy not in self.policies]

    def delete(self, policies: Iterable[Policy]) -> None:
        self.policies = [policy for policy in self.policies if policy not in policies]

    def check_tags(self, tags: dict[AppId, int], now: float) -> None:
        """Take over the tags found, if they may be as they are."""
        assert set(tags) == self.apps()
        assert len(set(tags.values())) == len(tags), "two apps share a tag"
        assert all(1 <= tag <= TAGS for tag in tags.values())
        resting = {tag: (since, app) for app, (since, tag) in self.freed.items()}
        for app, tag in tags.items():
            if app in self.used:
                assert tag == self.used[app], "an app's tag changed while it was in use"
            elif app in self.freed and self.freed[app][1] != tag:
                raise AssertionError("an app that came back has not got its tag back")
            elif tag in resting:
                since, owner = resting[tag]
                assert owner == app or now - since >= REST, "a tag was given away before it rested"
        taken = set(tags.values())
        self.freed = {app: (since, tag) for app, (since, tag) in self.freed.items() if tag not in taken}
        self.freed |= {app: (now, tag) for app, tag in self.used.items() if app not in tags}
        self.used = tags


APPS = [AppId(f"app-{name}") for name in "abcdef"]
PORTS = [Ports(Protocol.TCP, 80, 80), Ports(Protocol.TCP, 80, 90), Ports(Protocol.UDP, 53, 53)]
POLICIES = st.lists(
    st.builds(Policy, st.sampled_from(APPS), st.sampled_from(APPS), st.sampled_from(PORTS)), min_size=1, max_size=3
)
STEPS = st.lists(
    st.tuples(st.sampled_from(["create", "delete"]), POLICIES, st.booleans(), st.sampled_from([0.0, 0.4, 60.0, 101.0])),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_any_history_equals_the_model(steps: list[tuple[str, list[Policy], bool, float]]) -> None:
    async def run(folder: Path) -> None:
        async with bench(folder, highest=TAGS) as it:
            model, revision, replica = Model(), 0, dict[tuple[str, ...], Any]()
            for verb, policies, fails, pause in steps:
                if verb == "delete":  # also some that are there, so that apps go and their tags come free
                    policies += [policy for policy in model.policies if policy.source == policies[0].source]
                it.now[0] += pause
                it.ledger.fail_next = fails
                before = list(model.policies)
                try:
                    now = await getattr(it.store, verb)(policies, actor="somebody")
                except TagsExhausted:
                    now = revision
                else:
                    getattr(model, verb)(policies)
                it.ledger.fail_next = False
                assert now == revision + (model.policies != before)
                revision = now
                for outcome in it.outcomes:
                    replica |= dict(outcome.changes)
                it.outcomes.clear()

                assert await it.store.list(Filter()) == model.policies
                table = await it.table()
                model.check_tags({AppId(key[1]): tag for key, tag in table.items() if key[0] == "tag"}, it.now[0])
                # What was said to be committed makes up the table, and the table is made of the policies.
                assert {key for key, value in replica.items() if value is not None} == set(table)
                for source, destination in product(APPS, APPS):
                    ports = sorted(
                        policy.ports
                        for policy in model.policies
                        if (policy.source, policy.destination) == (source, destination)
                    )
                    found = table.get(("policy", destination, source), [])
                    assert found == [item.encode() for item in ports]

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


def between(source: str, destination: str, port: int = 80) -> Policy:
    return Policy(AppId(source), AppId(destination), Ports(Protocol.TCP, port, port))


async def tags(it: Bench) -> dict[str, int]:
    return {key[1]: tag for key, tag in (await it.table()).items() if key[0] == "tag"}


async def test_tags_are_given_from_1_source_first(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        await it.store.create([between("a", "b"), between("c", "a")], actor="x")
        assert await tags(it) == {"a": 1, "b": 2, "c": 3}


async def test_freed_tags_are_given_the_longest_rested_first_once_new_numbers_are_gone(tmp_path: Path) -> None:
    async with bench(tmp_path, highest=6) as it:
        for source, destination in ("ab", "cd", "ef"):
            await it.store.create([between(source, destination)], actor="x")
        for source, destination in ("ef", "ab"):
            it.now[0] += 10
            await it.store.delete([between(source, destination)], actor="x")
        with pytest.raises(TagsExhausted, match=r"2 needed, 0 free; at most 6 apps .* rests for 100 s"):
            await it.store.create([between("c", "d", 1), between("g", "h")], actor="x")
        assert await it.store.list(Filter()) == [between("c", "d")], "a refused request left something behind"
        it.now[0] += REST + 1
        await it.store.create([between("g", "h")], actor="x")
        assert await tags(it) == {"c": 3, "d": 4, "g": 5, "h": 6}


async def test_an_app_that_comes_back_gets_its_tag_back_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path, highest=2) as it:
        for _ in range(3):
            await it.store.create([between("a", "b")], actor="x")
            assert await tags(it) == {"a": 1, "b": 2}
            await it.store.delete([between("a", "b")], actor="x")
            assert await tags(it) == {}


async def test_long_lists_are_one_change(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        wanted = [between(f"a{i % 700}", f"b{i}", 1 + i % 3) for i in range(2100)]
        assert await it.store.create(wanted, actor="x") == 1
        assert await it.store.list(Filter()) == wanted
        assert len(await tags(it)) == 2800
        assert await it.store.create(wanted, actor="x") == 1
        assert await it.store.delete(wanted, actor="x") == 2
        assert await it.table() == {}


async def test_every_change_is_logged_with_its_events_and_actor(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        await it.store.create([between("a", "b")], actor="ann")
        await it.store.delete([between("a", "b")], actor="bob")
        added, removed = await it.ledger.log_from(it.outcomes[0].revision)
        data = {"source": "a", "destination": "b", "ports": ["tcp", 80, 80]}
        assert (added.actor, added.events[0]["kind"], added.events[0]["data"]) == ("ann", "policy.added", data)
        assert (removed.actor, removed.events[0]["kind"], removed.events[0]["data"]) == ("bob", "policy.removed", data)
        assert len(added.events) == len(removed.events) == 1
