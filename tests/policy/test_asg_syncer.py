"""Security groups follow the Cloud Controller, whatever it answers; one that does not change costs nothing."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from databases.core import Connection as DatabaseConnection
from starlette.responses import JSONResponse

from bus.database_options import DatabaseOptions
from bus.ledger import Ledger, Outcome
from bus.messages import SecurityGroup
from bus.security_groups import GroupId
from services.policy import asg_syncer
from services.policy.asg_syncer import Refused, Syncer
from services.policy.cc_api import Api
from services.policy.identity import Unavailable
from services.policy.leadership import Deposed
from services.policy.migrate import open_ledger, security_groups_ledger
from services.policy.remote import Answer
from services.policy.security_groups import Difference, SecurityGroups, entries
from tests.databases import EmptyDatabase
from tests.policy.stubs import CloudControllerStub, own_token, remote, rule, security_group

OPTIONS = DatabaseOptions()


@dataclass
class Sync:
    """A syncer, the stub that it reads, what it wrote, and its clock."""

    stub: CloudControllerStub
    ledger: Ledger
    groups: SecurityGroups
    syncer: Syncer
    now: float = 1000.0
    outcomes: list[Outcome[Difference]] = field(default_factory=list)

    async def names(self) -> list[str]:
        return sorted(await self.groups.all())

    def lists(self) -> int:
        return len(self.stub.asked_for("/v3/security_groups"))


@pytest.fixture
async def sync(stub: CloudControllerStub, tmp_path: Path) -> AsyncIterator[Sync]:
    async with open_ledger(f"sqlite:///{tmp_path}/policy.db", OPTIONS) as policies:
        yield make(stub, security_groups_ledger(policies))


def make(stub: CloudControllerStub, ledger: Ledger) -> Sync:
    token = own_token(stub.uaa)
    outcomes: list[Outcome[Difference]] = []
    groups = SecurityGroups(ledger, outcomes.append)
    made: list[Sync] = []
    syncer = Syncer(
        Api(remote(stub, "the Cloud Controller"), token),
        Api(remote(stub, "the Cloud Controller's internal API"), token),
        groups,
        clock=lambda: made[0].now,
    )
    made.append(Sync(stub, ledger, groups, syncer, outcomes=outcomes))
    return made[0]


async def test_what_is_there_is_copied_changed_and_removed(stub: CloudControllerStub, database: EmptyDatabase) -> None:
    async with open_ledger(database.url, OPTIONS) as policies:
        sync = make(stub, security_groups_ledger(policies))
        stub.groups = {
            "a": security_group("a", rule(), rule("icmp", type=8, code=-1, description="naïve 😀"), name="Ünicode"),
            "b": security_group("b", running=True, running_spaces=["s2", "s1"], staging_spaces=["s1"]),
            "c": security_group("c"),
        }
        await sync.syncer.sync()
        stored = await sync.groups.all()
        assert sorted(stored) == ["a", "b", "c"]
        assert stored[GroupId("a")].name == "Ünicode"
        assert stored[GroupId("a")].rules[1].description == "naïve 😀"
        assert stored[GroupId("b")].running_default
        assert not stored[GroupId("b")].staging_default
        assert stored[GroupId("b")].running_spaces == {"s1", "s2"}
        assert (await sync.ledger.head())[1] == 1
        stub.groups["b"]["name"] = "other"
        del stub.groups["c"]
        await sync.syncer.sync()
        assert await sync.names() == ["a", "b"]
        assert (await sync.ledger.head())[1] == 2
        _, second = sync.outcomes
        assert second.result is not None
        assert (list(second.result.put), list(second.result.gone)) == (["b"], ["c"])
        assert {key for key, _ in second.changes} == {("b",), ("c",)}
        content, _ = await sync.ledger.content(entries)
        decoded = [SecurityGroup.decode(GroupId(guid), value) for (guid,), value in await values(sync.ledger)]
        assert {group.guid: group for group in decoded} == await sync.groups.all()
        assert len(content.entries) == 2


async def values(ledger: Ledger) -> list[Any]:
    async def read(database: DatabaseConnection) -> list[Any]:
        return list((await entries(database)).items())

    return await ledger.read(read)


async def test_a_thousand_groups_that_do_not_change_cost_nothing(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    sync.stub.groups = {f"g{i}": security_group(f"g{i}", rule(), running_spaces=["s"]) for i in range(1000)}
    sync.stub.last_update = "2026-11-23T10:00:00Z"
    await sync.syncer.sync()
    statements: list[str] = []
    for name in ("fetch_all", "fetch_one", "fetch_val", "execute"):
        monkeypatch.setattr(DatabaseConnection, name, counting(getattr(DatabaseConnection, name), statements))
    sync.now += 10
    assert await sync.syncer.sync(), "the time of the change is past: this list is final"
    assert [text for text in statements if text.startswith("SELECT")] == statements[1:2], "read, to compare"
    assert not [text for text in statements if text.startswith(("INSERT", "UPDATE", "DELETE"))]
    lists = sync.lists()
    statements.clear()
    for _ in range(5):
        sync.now += 10
        assert await sync.syncer.sync()
    assert sync.lists() == lists, "no list is read"
    assert statements == [], "and no SQL"
    assert (await sync.ledger.head())[1] == 1
    assert len(sync.outcomes) == 1


def counting(method: Any, statements: list[str]) -> Any:
    async def counted(self: DatabaseConnection, query: Any, *arguments: Any, **named: Any) -> Any:
        statements.append(str(query))
        return await method(self, query, *arguments, **named)

    return counted


async def test_a_second_change_within_the_same_second_is_not_lost(sync: Sync) -> None:
    sync.stub.groups = {"a": security_group("a")}
    sync.stub.last_update = "2026-11-23T10:00:00Z"
    assert not await sync.syncer.sync()
    sync.stub.groups["b"] = security_group("b")  # and the time, in whole seconds, is still the same
    sync.now += 1
    assert not await sync.syncer.sync()
    assert await sync.names() == ["a", "b"]
    sync.stub.groups["c"] = security_group("c")
    sync.now += 1.5
    assert await sync.syncer.sync()
    assert await sync.names() == ["a", "b", "c"]
    lists = sync.lists()
    sync.now += 10
    assert await sync.syncer.sync()
    assert sync.lists() == lists


async def test_an_earlier_time_is_another_time(sync: Sync) -> None:
    """The Cloud Controller's database was restored."""
    sync.stub.groups = {"a": security_group("a")}
    sync.stub.last_update = "2026-11-23T10:00:00Z"
    await sync.syncer.sync()
    sync.now += 10
    await sync.syncer.sync()
    sync.stub.groups = {"b": security_group("b")}
    sync.stub.last_update = "2026-11-22T10:00:00Z"
    await sync.syncer.sync()
    assert await sync.names() == ["b"]


async def test_from_time_to_time_the_list_is_read_whatever_the_time_says(sync: Sync) -> None:
    sync.stub.groups = {"a": security_group("a")}
    sync.stub.last_update = "2026-11-23T10:00:00Z"
    await sync.syncer.sync()
    sync.now += 10
    await sync.syncer.sync()
    sync.stub.groups["b"] = security_group("b")
    sync.now += asg_syncer.RELIST_SECONDS
    assert await sync.syncer.sync()
    assert await sync.names() == ["a", "b"]


async def test_after_a_restore_of_our_own_database_the_list_is_read(sync: Sync) -> None:
    sync.stub.groups = {"a": security_group("a")}
    sync.stub.last_update = "2026-11-23T10:00:00Z"
    await sync.syncer.sync()
    sync.now += 10
    assert await sync.syncer.sync()
    await sync.ledger.database.execute("DELETE FROM silkbus_security_groups")
    sync.syncer.reread()
    await sync.syncer.sync()
    assert await sync.names() == ["a"]


async def test_a_list_that_changes_while_it_is_read_is_read_again(sync: Sync) -> None:
    """A group goes from the first page and another comes: without a second look c, on neither page, were lost."""
    sync.stub.per_page = 2
    sync.stub.groups = {guid: security_group(guid) for guid in "abcd"}
    sync.stub.last_update = "2026-11-23T10:00:00Z"
    pages = 0

    def change() -> None:
        nonlocal pages
        pages += 1
        if pages == 2:
            del sync.stub.groups["a"]
            sync.stub.groups["e"] = security_group("e")
            sync.stub.last_update = "2026-11-23T10:00:01Z"

    sync.stub.during = change
    await sync.syncer.sync()
    assert await sync.names() == ["b", "c", "d", "e"]
    assert len(sync.outcomes) == 1
    assert pages == 4


async def test_that_is_noticed_without_the_time_too(sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asg_syncer, "PER_PAGE", 2)
    sync.stub.groups = {guid: security_group(guid) for guid in "abcd"}
    pages = 0

    def change() -> None:
        nonlocal pages
        pages += 1
        if pages == 2:
            del sync.stub.groups["a"]
            sync.stub.groups["e"] = security_group("e")

    sync.stub.during = change
    assert await sync.syncer.sync(), "nothing better can be known without the time"
    assert await sync.names() == ["b", "c", "d", "e"]


async def test_a_list_that_never_stands_still_is_given_up_for_now(sync: Sync) -> None:
    sync.stub.groups = {"a": security_group("a")}
    await sync.syncer.sync()
    seconds = 0

    def change() -> None:
        nonlocal seconds
        seconds += 1
        sync.stub.last_update = f"2026-11-23T10:00:{seconds:02}Z"

    sync.stub.last_update = "2026-11-23T10:00:00Z"
    sync.stub.groups = {"b": security_group("b")}
    sync.stub.during = change
    with pytest.raises(Unavailable, match="changed its security groups each of 3 times while they were read"):
        await sync.syncer.sync()
    assert await sync.names() == ["a"]
    sync.stub.during = None
    await sync.syncer.sync()
    assert await sync.names() == ["b"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (500, "the Cloud Controller.* answered with status 500"),
        (429, "answered with status 429"),
        (401, "does not accept this server's token"),
        (403, "does not accept this server's token"),
        (404, "has no /v3/security_groups"),
        (302, "answered with status 302"),
        ("garbage", "gave an answer that is no JSON object"),
        ("list", "gave an answer that is no JSON object"),
        ("gone", "cannot be reached"),
        ("uaa", "UAA answered with status 500"),
    ],
)
async def test_whatever_fails_what_was_there_stays(sync: Sync, fault: str | int, text: str) -> None:
    sync.stub.groups = {"a": security_group("a")}
    await sync.syncer.sync()
    sync.stub.groups = {"b": security_group("b")}
    if fault == "gone":
        sync.stub.stop()
    elif fault == "uaa":
        sync.stub.uaa.fault = 500
        sync.stub.uaa.own_tokens.clear()
    else:
        sync.stub.fault = fault
    with pytest.raises(Unavailable, match=text):
        await sync.syncer.sync()
    assert await sync.names() == ["a"]
    assert (await sync.ledger.head())[1] == 1
    sync.stub.fault = sync.stub.uaa.fault = None
    if fault == "gone":
        sync.stub.start()
    await sync.syncer.sync()
    assert await sync.names() == ["b"]


@pytest.mark.parametrize(
    "answer",
    [
        {"resources": []},
        {"pagination": {"total_pages": 1, "total_results": 5}, "resources": [security_group("b")]},
        {"pagination": {"total_pages": 1, "total_results": 1}, "resources": None},
        {"pagination": {"total_pages": 1, "total_results": 1}, "resources": [{"name": "no guid"}]},
        {"pagination": {"total_pages": 1, "total_results": 1}, "resources": [7]},
        {"pagination": {"total_pages": "1", "total_results": 1}, "resources": []},
        {"pagination": {"total_pages": 1, "total_results": 2}, "resources": [security_group("b")] * 2},
    ],
)
async def test_an_answer_that_is_not_whole_changes_nothing(
    sync: Sync, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync.stub.groups = {"a": security_group("a")}
    await sync.syncer.sync()
    monkeypatch.setattr(sync.stub, "_page", lambda *_: JSONResponse(answer))
    with pytest.raises(Unavailable):
        await sync.syncer.sync()
    assert await sync.names() == ["a"]


@pytest.mark.parametrize("answer", [{}, {"last_update": 7}, {"last_update": ""}])
async def test_a_time_that_is_none_is_an_error(sync: Sync, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    get_if_there = Api.get_if_there

    async def wrong(self: Api, path: str, *arguments: Any) -> Any:
        found = await get_if_there(self, path, *arguments)
        return Answer(200, json.dumps(answer).encode()) if path == asg_syncer.LAST_UPDATE else found

    monkeypatch.setattr(Api, "get_if_there", wrong)
    with pytest.raises(Unavailable, match="cannot be understood"):
        await sync.syncer.sync()


async def test_an_empty_list_is_not_believed_while_there_are_many(sync: Sync) -> None:
    sync.stub.groups = {f"g{i}": security_group(f"g{i}") for i in range(asg_syncer.MAY_VANISH + 1)}
    await sync.syncer.sync()
    sync.stub.groups = {}
    with pytest.raises(Refused, match="lists no security groups at all, and 11 are known: they are kept"):
        await sync.syncer.sync()
    assert len(await sync.names()) == 11
    sync.stub.groups = {"one": security_group("one")}
    await sync.syncer.sync()
    assert await sync.names() == ["one"]
    sync.stub.groups = {}
    await sync.syncer.sync()
    assert await sync.names() == []


async def test_bad_rules_and_groups_are_named_once_and_the_rest_is_kept(
    sync: Sync, caplog: pytest.LogCaptureFixture
) -> None:
    sync.stub.groups = {"a": security_group("a", rule()), "b": security_group("b", rule())}
    await sync.syncer.sync()
    before = await sync.groups.all()
    sync.stub.groups["a"]["rules"] = [rule(ports="70000"), rule("udp")]
    sync.stub.groups["b"] = {"guid": "b"}
    sync.stub.groups["c"] = security_group("c", rule(ports="80"))
    for _ in range(3):
        await sync.syncer.sync()
    after = await sync.groups.all()
    assert [str(item.protocol) for item in after[GroupId("a")].rules] == ["udp"]
    assert after[GroupId("b")] == before[GroupId("b")]
    assert after[GroupId("c")].rules
    said = [record.about["problem"] for record in caplog.records if "not wholly" in record.message]  # type: ignore[attr-defined]
    assert said == [
        "security group 'name-of-a' (a): rule 1: ports: 70000-70000 is not a range within 1-65535",
        "security group b: /v3/security_groups: resource: name: missing",
    ]
    assert asg_syncer.BAD_RULES._value.get() == 1
    assert asg_syncer.BAD_GROUPS._value.get() == 1
    assert asg_syncer.GROUPS._value.get() == 2


async def test_who_may_not_write_any_more_does_not(sync: Sync) -> None:
    sync.stub.groups = {"a": security_group("a")}

    async def fence(_: DatabaseConnection) -> None:
        raise Deposed("over")

    with pytest.raises(Deposed):
        await sync.syncer.sync(fence)
    assert await sync.names() == []
    assert (await sync.ledger.head())[1] == 0
