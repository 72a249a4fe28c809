"""Taking over the original's database, on the databases it can have, into each of ours, or where it lies."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.ledger import Ledger
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy.commands import main
from services.policy.migrate import open_ledger
from services.policy.store import Filter, Store, entries
from services.policy.tag_pool import TagPool
from services.policy.takeover import Refused, Report, take_over
from tests.databases import EmptyDatabase, Server
from tests.policy.original_database import Flow, OriginalDatabase

OPTIONS = DatabaseOptions()
HAVE_SERVERS = pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)
FLOWS: list[Flow] = [
    ("web", "db", "tcp", 5432, 5432),
    ("worker", "db", "tcp", 5432, 5432),  # shares its destination
    ("web", "db", "udp", 5000, 5010),
    ("web", "web", "tcp", 1, 65535),
    ("worker", "web", "tcp", 8080, 8080),
    ("INGRESS", "web", "tcp", 8080, 8080),
]
RULES = [{"protocol": "tcp", "destination": "10.0.0.0/8", "ports": "443", "type": 0, "code": 0, "log": True}]


@asynccontextmanager
async def original(url: str) -> AsyncIterator[OriginalDatabase]:
    """With a freed tag (2) between used ones, a router's group, and security groups."""
    async with open_database(url) as database:
        made = OriginalDatabase(database)
        await made.create()
        for number, guid in enumerate(["web", "gone", "db", "worker", "INGRESS"], 1):
            await made.give(guid, number, "router" if guid == "INGRESS" else "app")
        await made.give("ROUTER-WITHOUT-POLICIES", 9, "router")
        await made.take("gone")
        await made.allow(FLOWS)
        await made.secure("asg-1", RULES, ["space-1", "space-2"], default=False)
        await made.secure("asg-2", [], [], default=True)
        yield made


def policies(flows: list[Flow]) -> list[Policy]:
    return [Policy(AppId(s), AppId(d), Ports(Protocol(p), start, end)) for s, d, p, start, end in flows]


async def assert_taken_over(ledger: Ledger, source: OriginalDatabase) -> None:
    store = Store(ledger, TagPool(rest=100, clock=lambda: 0.0), lambda _: None)
    assert await store.list(Filter()) == policies(FLOWS)
    assert {app: tag for app, tag, _ in await store.tags()} == source.groups
    assert {app for app, _, kind in await store.tags() if kind == "router"} == {"INGRESS", "ROUTER-WITHOUT-POLICIES"}
    content, _ = await ledger.content(entries)
    assert len(content.entries) == len({flow[:2] for flow in FLOWS}) + len(source.groups)
    groups = await ledger.database.fetch_all("SELECT * FROM silkbus_security_groups ORDER BY guid")
    assert [(row["guid"], row["name"], bool(row["running_default"])) for row in groups] == [
        ("asg-1", "asg-1's", False),
        ("asg-2", "asg-2's", True),
    ]
    (rule,) = json.loads(groups[0]["rules"])
    assert (rule["destinations"], rule["ports"], rule["log"]) == (["10.0.0.0/8"], [[443, 443]], True)
    assert json.loads(groups[0]["running_spaces"]) == ["space-1", "space-2"]
    assert json.loads(groups[0]["staging_spaces"]) == []


@HAVE_SERVERS
@pytest.mark.parametrize("where", ["in place", "sqlite"])
async def test_all_of_it_with_the_same_tags_as_often_as_one_likes(
    database: EmptyDatabase, where: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    url = database.url if where == "in place" else f"sqlite:///{tmp_path_factory.mktemp('ours')}/policy.db"
    async with original(database.url) as source, open_ledger(url, OPTIONS) as ledger:
        before = await source.content()
        report = await take_over(ledger, database.url, OPTIONS)
        assert report == Report(6 - 1, 6 - 1, 6, 6, 2, 2, [])
        await assert_taken_over(ledger, source)
        head = await ledger.head()
        assert (await take_over(ledger, database.url, OPTIONS)).new_policies == 0
        assert await ledger.head() == head, "nothing new, no change"
        await assert_taken_over(ledger, source)
        assert await source.content() == before


@HAVE_SERVERS
async def test_one_cut_short_is_completed(database: EmptyDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.policy.takeover.AT_ONCE", 2)
    made = 0

    async def failing(self: Store, *arguments: object, **named: object) -> object:
        nonlocal made
        made += 1
        if made == 3:
            raise ConnectionResetError
        return await create(self, *arguments, **named)  # type: ignore[arg-type]

    create = Store.create
    async with original(database.url) as source, open_ledger(database.url, OPTIONS) as ledger:
        monkeypatch.setattr(Store, "create", failing)
        with pytest.raises(ConnectionResetError):
            await take_over(ledger, database.url, OPTIONS)
        report = await take_over(ledger, database.url, OPTIONS)
        assert (report.policies, report.new_policies, report.new_tags) == (6, 2, 0)
        await assert_taken_over(ledger, source)


@HAVE_SERVERS
async def test_freed_tags_rest_before_others_have_them(database: EmptyDatabase) -> None:
    async with original(database.url), open_ledger(database.url, OPTIONS) as ledger:
        await take_over(ledger, database.url, OPTIONS)
        for ahead, expected in ((0, [10, 11]), (5000, [2, 6])):
            now = time.time() + ahead
            pool = TagPool(rest=1000, clock=lambda now=now: now, highest=11)  # type: ignore[misc]
            store = Store(ledger, pool, lambda _: None)
            added = [Policy(AppId(f"new{ahead}"), AppId(f"other{ahead}"), Ports(Protocol.TCP, 1, 1))]
            await store.create(added, actor="x")
            assert [tag for app, tag, _ in await store.tags() if app.endswith(str(ahead)) and len(app) > 3][
                :2
            ] == expected
        await store.delete(policies(FLOWS), actor="x")
        assert {app for app, _, kind in await store.tags() if kind == "router"} == {
            "INGRESS",
            "ROUTER-WITHOUT-POLICIES",
        }


@HAVE_SERVERS
async def test_a_database_that_holds_something_else_is_left_alone(database: EmptyDatabase, tmp_path: object) -> None:
    async with original(database.url) as source:
        async with open_ledger(f"sqlite:///{tmp_path}/used.db", OPTIONS) as ledger:
            store = Store(ledger, TagPool(rest=0, clock=lambda: 0.0), lambda _: None)
            await store.create(policies(FLOWS[:1]), actor="somebody")
            with pytest.raises(Refused, match="already been changed through the API"):
                await take_over(ledger, database.url, OPTIONS)
            assert await store.list(Filter()) == policies(FLOWS[:1])
        async with open_ledger(f"sqlite:///{tmp_path}/older.db", OPTIONS) as ledger:
            await take_over(ledger, database.url, OPTIONS)
            await source.database.execute("DELETE FROM policies WHERE id = 1")
            with pytest.raises(Refused, match="holds what the original's does not: policy web to db tcp 5432-5432"):
                await take_over(ledger, database.url, OPTIONS)


@HAVE_SERVERS
async def test_odd_rows_are_left_out_and_named(database: EmptyDatabase) -> None:
    async with original(database.url) as source:
        await source.allow([("web", "db", "tcp", 70000, 70000)])
        await source.give("stale", 7)
        await source.allow([("stale", "db", "tcp", 1, 1), ("web", "stale", "tcp", 1, 1)])
        await source.take("stale")
        if database.kind == "postgresql":
            await source.database.execute("INSERT INTO policies (group_id, destination_id) VALUES (1, NULL)")
        else:
            await source.database.execute("INSERT INTO policies (group_id) VALUES (1)")
        async with open_ledger(database.url, OPTIONS) as ledger:
            report = await take_over(ledger, database.url, OPTIONS)
            assert [reason.partition(" ")[2].partition(" ")[2] for reason in report.left_out] == [
                "web to db: ports: 70000-70000 is not a range within 1-65535",
                "its source group is free",
                "its destination group is free",
                "its row of destinations is gone",
            ]
            await assert_taken_over(ledger, source)


@HAVE_SERVERS
async def test_tags_beyond_16_bits_and_other_impossible_rows_are_refused(database: EmptyDatabase) -> None:
    async with original(database.url) as source, open_ledger(database.url, OPTIONS) as ledger:
        await source.database.execute(source.quoted("INSERT INTO GROUPS (id, guid) VALUES (65536, 'far')"))
        await source.give("blank ", 40)
        await source.allow([("web", "db", "icmp", 1, 1)])
        with pytest.raises(Refused) as refused:
            await take_over(ledger, database.url, OPTIONS)
        text = str(refused.value)
        assert "group 'far' has tag 65536, and VXLAN carries tags of 1 to 65535 only" in text
        assert "group 40: guid 'blank ' must be printable and not begin or end with a blank" in text
        assert "protocol 'icmp' is neither tcp nor udp" in text
        assert await Store(ledger, TagPool(rest=0, clock=lambda: 0.0), lambda _: None).tags() == []


@HAVE_SERVERS
def test_the_command(database: EmptyDatabase, capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert isinstance(database.server, Server)
    assert main(["import", "--database", f"sqlite:///{tmp_path}/p.db", "--from", database.url]) == 1
    assert (
        "not the database of a policy server of 1.4 or later: groups has no guid, id, type" in capsys.readouterr().err
    )
    assert main(["import", "--database", f"sqlite:///{tmp_path}/p.db"]) == 1
    assert "is PostgreSQL or MySQL: give its URL with --from" in capsys.readouterr().err

    async def fill() -> None:
        async with original(database.url):
            pass

    asyncio.run(fill())
    assert main(["import", "--database", database.url]) == 0
    printed = capsys.readouterr().out
    assert "tags             5 (5 new)" in printed
    assert "policies         6 (6 new)" in printed


@HAVE_SERVERS
async def test_a_large_one(database: EmptyDatabase) -> None:
    async with open_database(database.url) as opened:
        source = OriginalDatabase(opened, free=1)
        await source.create()
        for statement in (
            "INSERT INTO GROUPS (id, guid) SELECT n, CONCAT('app-', n) FROM NUMBERS WHERE n BETWEEN 2 AND 3000",
            "INSERT INTO destinations (id, group_id, port, protocol, start_port, end_port)"
            " SELECT n, n, 80, 'tcp', 80, 80 FROM NUMBERS WHERE n BETWEEN 2 AND 3000",
            "INSERT INTO policies (group_id, destination_id) SELECT a.n, a.n + b.n FROM NUMBERS_A CROSS JOIN NUMBERS_B"
            " WHERE a.n BETWEEN 2 AND 2900 AND b.n BETWEEN 1 AND 7",
        ):
            series = {
                "postgresql": "(SELECT n FROM generate_series(1, 3000) AS s (n)) AS ALIAS",
                "mysql": "(SELECT seq AS n FROM seq_1_to_3000) AS ALIAS",
            }[database.kind]
            for name, alias in (("NUMBERS_A", "a"), ("NUMBERS_B", "b"), ("NUMBERS", "numbers")):
                statement = statement.replace(name, series.replace("ALIAS", alias))
            await opened.execute(source.quoted(statement))
        async with open_ledger(database.url, OPTIONS) as ledger:
            report = await take_over(ledger, database.url, OPTIONS)
            assert (report.tags, report.policies) == (2999, 2899 * 7)
