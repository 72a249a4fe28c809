"""History over the API and in the store, and the list as it was, against what was really there."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import services.policy.history
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy.history import History, NoSuchRevision, TooFarBack, Wanted
from services.policy.store import Filter
from tests.databases import EmptyDatabase
from tests.policy.server import DELETE, POLICIES, READER_TOKEN, WRITE_TOKEN, PolicyServer, body, policy
from tests.policy.test_store import bench_on, between

HISTORY = "/networking/v1/external/history"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    """One with four changes by the admin: a-b; c-d and a-d; without a-b; a-b again."""
    server = PolicyServer(tmp_path_factory.mktemp("history"))
    server.start()
    with server.client() as client:
        client.post(POLICIES, json=body(policy("a", "b"))).raise_for_status()
        client.post(POLICIES, json=body(policy("c", "d", 1, 2, "udp"), policy("a", "d"))).raise_for_status()
        client.post(DELETE, json=body(policy("a", "b"))).raise_for_status()
        client.post(POLICIES, json=body(policy("a", "b"))).raise_for_status()
        client.post(POLICIES, json=body(policy("a", "b"))).raise_for_status()  # changes nothing
    yield server
    server.close()


@pytest.fixture
def api(server: PolicyServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def revisions(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [entry["revision"] for entry in answer.json()["history"]]


def test_every_change_is_told_latest_first(api: httpx.Client) -> None:
    answer = api.get(HISTORY)
    assert answer.headers["content-type"] == "application/json"
    assert revisions(answer) == [4, 3, 2, 1]
    assert answer.json()["next"] is None
    again, removed, both, _ = answer.json()["history"]
    assert set(both) == {"revision", "time", "user", "request_id", "added", "removed"}
    assert (both["user"], both["added"]) == ("admin", [policy("c", "d", 1, 2, "udp"), policy("a", "d")])
    assert (removed["added"], removed["removed"]) == ([], [policy("a", "b")])
    assert both["time"] <= removed["time"] <= again["time"]
    assert both["time"].endswith("Z")


def test_pages_hang_together(api: httpx.Client) -> None:
    first = api.get(HISTORY, params={"limit": 3})
    assert revisions(first) == [4, 3, 2]
    assert first.json()["next"] == {"before": 2}
    second = api.get(HISTORY, params={"limit": 3, **first.json()["next"]})
    assert revisions(second) == [1]
    assert second.json()["next"] is None
    assert api.get(HISTORY, params={"limit": 4}).json()["next"] is None
    assert revisions(api.get(HISTORY, params={"after": 1, "before": 4})) == [3, 2]


def test_filters(api: httpx.Client) -> None:
    of_c = api.get(HISTORY, params={"app_id": "c"})
    assert revisions(of_c) == [2]
    assert of_c.json()["history"][0]["added"] == [policy("c", "d", 1, 2, "udp")]
    assert revisions(api.get(HISTORY, params={"app_id": "b"})) == [4, 3, 1]
    assert revisions(api.get(HISTORY, params={"app_id": "b", "before": 4, "limit": 1})) == [3]
    assert revisions(api.get(HISTORY, params={"app_id": "nobody"})) == []
    assert revisions(api.get(HISTORY, params={"user": "admin"})) == [4, 3, 2, 1]
    assert revisions(api.get(HISTORY, params={"user": "Admin"})) == []
    third = api.get(HISTORY).json()["history"][1]["time"]
    assert 3 in revisions(api.get(HISTORY, params={"since": third, "until": third}))
    assert 4 not in revisions(api.get(HISTORY, params={"until": "2020-01-01T00:00:00+01:00"}))


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("limit=0", "limit: must be a whole number in 1..1000, not '0'"),
        ("limit=1001", "limit: must be a whole number in 1..1000"),
        ("before=-1", "before: must be a whole number"),
        ("after=%D9%A1", "after: must be a whole number"),
        ("before=99999999999999999999", "before: must be a whole number"),
        ("since=yesterday", "since: must be a time with its zone"),
        ("until=2026-11-23T19:20:40", "until: must be a time with its zone"),
        ("app_id=", "app_id: must be 1 to 255"),
        ("user=" + "x" * 256, "user: must be 1 to 255"),
        ("user=a&user=b", "user: given more than once"),
        ("app=a", "app: no such parameter; there are limit"),
    ],
)
def test_wrong_parameters_are_named(api: httpx.Client, query: str, text: str) -> None:
    answer = api.get(f"{HISTORY}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(text)


def test_history_is_for_admins(server: PolicyServer) -> None:
    for token in (WRITE_TOKEN, READER_TOKEN):
        with server.client(token) as client:
            assert client.get(HISTORY).status_code == 403
    assert httpx.get(server.url + HISTORY).status_code == 401


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"at": 0}, []),
        ({"at": 1}, [policy("a", "b")]),
        ({"at": 3}, [policy("c", "d", 1, 2, "udp"), policy("a", "d")]),
        ({"at": 3, "source_id": "a"}, [policy("a", "d")]),
        ({"at": 2, "id": "b,c"}, [policy("a", "b"), policy("c", "d", 1, 2, "udp")]),
        ({"at": 4}, [policy("c", "d", 1, 2, "udp"), policy("a", "d"), policy("a", "b")]),
    ],
)
def test_the_list_as_it_was(api: httpx.Client, query: dict[str, Any], expected: list[Any]) -> None:
    answer = api.get(POLICIES, params=query)
    assert answer.status_code == 200
    found = answer.json()
    assert found["total_policies"] == len(expected)
    assert sorted(found["policies"], key=str) == sorted(expected, key=str)


def test_revisions_that_cannot_be_had(api: httpx.Client) -> None:
    answer = api.get(POLICIES, params={"at": 5})
    assert (answer.status_code, answer.json()["error"]) == (404, "revision 5 is not there yet: the latest is 4")
    for wrong in ("", "x", "-1", "1.5"):
        answer = api.get(POLICIES, params={"at": wrong})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("at: must be a whole number")


async def test_any_revision_can_be_looked_at_again(database: EmptyDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services.policy.history, "_AT_ONCE", 7)
    chance = random.Random(11)  # noqa: S311
    apps = [AppId(name) for name in "abcdef"]
    async with bench_on(database.url) as it:
        history = History(it.ledger)
        past: list[set[Policy]] = [set()]
        changes: list[tuple[set[Policy], str]] = []
        while len(past) < 60:
            some = [
                Policy(chance.choice(apps), chance.choice(apps), Ports(Protocol.TCP, 1, chance.randint(1, 3)))
                for _ in range(chance.randint(1, 5))
            ]
            actor = chance.choice(["ann", "bob"])
            await getattr(it.store, chance.choice(["create", "delete"]))(some, actor=actor)
            now = set(await it.store.list(Filter()))
            if now != past[-1]:
                changes.append((now ^ past[-1], actor))
                past.append(now)
        for revision, expected in enumerate(past):
            found = await history.policies_at(revision)
            assert set(found) == expected
            assert len(found) == len(expected)
        for app in apps:
            for user in (None, "ann"):
                expected_revisions = [
                    number
                    for number, (changed, actor) in enumerate(changes, 1)
                    if any(app in (item.source, item.destination) for item in changed) and user in (None, actor)
                ]
                seen: list[int] = []
                wanted: Wanted | None = Wanted(app=app, user=user, limit=5)
                while wanted is not None:
                    entries, following = await history.page(wanted)
                    seen += [entry.revision for entry in entries]
                    wanted = following and Wanted(app=app, user=user, limit=5, before=following)
                    for entry in entries:
                        assert {*entry.added, *entry.removed} == {
                            item for item in changes[entry.revision - 1][0] if app in (item.source, item.destination)
                        }
                assert seen == expected_revisions[::-1]


async def test_what_history_costs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench_on(f"sqlite:///{tmp_path}/policy.db") as it:
        history = History(it.ledger)
        for number in range(6):
            await it.store.create([between(f"a{number}", f"b{k}") for k in range(10)], actor="x")
        monkeypatch.setattr(services.policy.history, "MAX_POLICIES", 25)
        entries, following = await history.page(Wanted())
        assert ([entry.revision for entry in entries], following) == ([6, 5, 4], 4)
        monkeypatch.setattr(services.policy.history, "MAX_POLICIES_BACK", 25)
        assert len(await history.policies_at(4)) == 40
        with pytest.raises(TooFarBack, match=r"more than 25 policies .* ask for revision 4 or later"):
            await history.policies_at(3)
        monkeypatch.setattr(services.policy.history, "MAX_CHANGES_BACK", 1)
        with pytest.raises(TooFarBack, match=r"revision 4 is 2 changes back.*ask for revision 5 or later"):
            await history.policies_at(4)
        await it.ledger.database.execute("DELETE FROM change_log WHERE revision <= 4")
        assert len(await history.policies_at(5)) == 50
        with pytest.raises(NoSuchRevision, match="revision 3 is no longer known: the change log begins with 5"):
            await history.policies_at(3)
