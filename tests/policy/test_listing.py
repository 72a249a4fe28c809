"""Lists from memory are those that the database would give, whoever changed it (services/policy/listing.py)."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from bus.database import open_database
from bus.ledger import Ledger
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy import listing, wire_v1
from services.policy.listing import Listing
from services.policy.schema import MIGRATIONS
from services.policy.store import Filter, Store
from services.policy.tag_pool import TagPool
from tests.databases import EmptyDatabase

APPS = [AppId(name) for name in "abcdef"]


def policies(chance: random.Random, count: int) -> list[Policy]:
    return [
        Policy(chance.choice(APPS), chance.choice(APPS), Ports(Protocol.TCP, port := chance.randint(1, 3), port))
        for _ in range(count)
    ]


async def compare(ours: Listing, truth: Store, chance: random.Random) -> None:
    await ours.refresh()
    some: Sequence[AppId] = chance.sample(APPS, 2)
    for wanted in (
        Filter(),
        Filter(either=some),
        Filter(sources=some),
        Filter(destinations=some),
        Filter(sources=some, destinations=APPS),
        Filter(either=[]),
        Filter(either=["nobody"]),
    ):
        assert ours.find(wanted) == await truth.list(wanted)
    assert await ours.encoded(wire_v1) == wire_v1.encode(await truth.list(Filter()))


@pytest.mark.parametrize("behind", [0, 3, listing.MAX_BEHIND])
async def test_lists_follow_the_changes_of_another_server(
    database: EmptyDatabase, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_BEHIND", behind)
    chance = random.Random(7)  # noqa: S311
    async with open_database(database.url) as theirs, open_database(database.url) as ours:
        ledger = Ledger(theirs, "policies")
        await ledger.migrate(MIGRATIONS)
        store = Store(ledger, TagPool(rest=0, clock=lambda: 0), lambda _: None)
        lists = Listing(Ledger(ours, "policies"))
        await compare(lists, store, chance)
        for _ in range(25):
            for _ in range(chance.randint(0, 5)):
                change = store.create if chance.random() < 0.6 else store.delete
                await change(policies(chance, chance.randint(1, 6)), actor="ann")
            await compare(lists, store, chance)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_restored_database_is_read_anew(database: EmptyDatabase) -> None:
    """As long a history as before, but another one."""
    chance = random.Random(7)  # noqa: S311
    async with open_database(database.url) as connected:
        ledger = Ledger(connected, "policies")
        await ledger.migrate(MIGRATIONS)
        store = Store(ledger, TagPool(rest=0, clock=lambda: 0), lambda _: None)
        lists = Listing(ledger)
        await store.create(policies(chance, 5), actor="ann")
        before = [Policy(AppId("x"), AppId("y"), Ports(Protocol.UDP, 1, 9))]
        await store.create(before, actor="ann")
        await compare(lists, store, chance)
        for statement in (
            "DELETE FROM silkbus_policies WHERE source = 'x'",
            "DELETE FROM silkbus_tags WHERE app IN ('x', 'y')",
            "DELETE FROM silkbus_changed_apps WHERE revision = 2",
            "DELETE FROM change_log WHERE revision = 2",
            "UPDATE table_head SET revision = 1",
        ):
            await connected.execute(statement)
        await store.create([Policy(AppId("z"), AppId("y"), Ports(Protocol.UDP, 1, 9))], actor="ann")
        await compare(lists, store, chance)
        await store.create(policies(chance, 20), actor="ann")
        await compare(lists, store, chance)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_what_is_committed_before_a_question_is_in_its_answer(database: EmptyDatabase) -> None:
    async with open_database(database.url) as connected:
        ledger = Ledger(connected, "policies")
        await ledger.migrate(MIGRATIONS)
        store = Store(ledger, TagPool(rest=0, clock=lambda: 0), lambda _: None)
        lists = Listing(ledger)

        async def one(number: int) -> None:
            policy = Policy(AppId(f"a{number}"), AppId("b"), Ports(Protocol.TCP, 1, 1))
            await store.create([policy], actor="ann")
            await lists.refresh()
            assert policy in lists.find(Filter())

        await asyncio.gather(*(one(number) for number in range(40)))
