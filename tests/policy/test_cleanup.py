"""Policies of deleted apps are removed, and only those: with a real database, and a Cloud Controller that errs."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from databases.core import Connection as DatabaseConnection
from starlette.responses import JSONResponse

from bus.database_options import DatabaseOptions
from bus.messages import AppId, Policy, Ports, Protocol
from services.policy import cleanup
from services.policy.cleanup import Cleaner, Refused
from services.policy.cloud_controller import CloudController
from services.policy.identity import Unavailable
from services.policy.leadership import Deposed
from services.policy.migrate import open_ledger
from services.policy.store import Filter, Store
from services.policy.tag_pool import TagPool
from tests.policy.stubs import CloudControllerStub, own_token, remote


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_ledger(f"sqlite:///{tmp_path}/policy.db", DatabaseOptions()) as ledger:
        yield Store(ledger, TagPool(rest=100, clock=lambda: 0.0), lambda _: None)


@pytest.fixture
def cleaner(stub: CloudControllerStub, store: Store) -> Cleaner:
    apps = CloudController(remote(stub, "the Cloud Controller"), own_token(stub.uaa), remember=0)
    return Cleaner(store, apps, max_percent=25)


def policy(source: str, destination: str, port: int = 8080) -> Policy:
    return Policy(AppId(source), AppId(destination), Ports(Protocol.TCP, port, port))


def count(outcome: str) -> float:
    return float(cleanup.CLEANUPS.labels(outcome)._value.get())


async def test_policies_with_an_end_that_is_gone_are_removed(
    stub: CloudControllerStub, store: Store, cleaner: Cleaner
) -> None:
    kept, gone = [policy("a", "b"), policy("b", "a")], [policy("a", "x"), policy("x", "a"), policy("x", "y")]
    await store.create([*kept, *gone], actor="test")
    stub.apps = {"a": "s", "b": "s", "other": "s"}
    assert await cleaner.clean() == gone
    assert await store.list(Filter()) == kept
    assert {app for app, _, _ in await store.tags()} == {"a", "b"}
    assert await cleaner.clean() == []


async def test_each_is_reported_once_however_many_apps_there_are(
    stub: CloudControllerStub, store: Store, cleaner: Cleaner
) -> None:
    """The original lists a policy twice whose ends it asks for in different requests (contract/policy.md 1.8)."""
    policies = [policy(f"a{i:03}", f"z{i:03}") for i in range(120)]
    stub.apps = {f"a{i:03}": "s" for i in range(120)} | {f"z{i:03}": "s" for i in range(100)}
    await store.create(policies, actor="test")
    assert await cleaner.clean() == policies[100:]
    assert len(stub.asked) == 3
    stub.apps = {}
    gone = await cleaner.clean(force=True)
    assert gone == policies[:100]


async def test_the_router_is_no_app(stub: CloudControllerStub, store: Store, cleaner: Cleaner) -> None:
    await store.tag(AppId("INGRESS_ROUTER"), "router", actor="test")
    await store.create([policy("INGRESS_ROUTER", "a"), policy("INGRESS_ROUTER", "x")], actor="test")
    stub.apps = {"a": "s"}
    assert await cleaner.clean() == [policy("INGRESS_ROUTER", "x")]
    assert "INGRESS_ROUTER" in {app for app, _, _ in await store.tags()}


async def test_what_can_be_no_guid_is_gone(stub: CloudControllerStub, store: Store, cleaner: Cleaner) -> None:
    await store.create([policy("a", "b,a"), policy("a", "a")], actor="test")
    stub.apps = {"a": "s"}
    assert await cleaner.clean() == [policy("a", "b,a")]


@pytest.mark.parametrize(
    ("total", "gone", "allowed"), [(10, 10, True), (40, 10, True), (11, 11, False), (44, 11, True), (43, 11, False)]
)
async def test_not_more_than_a_share_goes_unless_forced(
    stub: CloudControllerStub, store: Store, cleaner: Cleaner, total: int, gone: int, allowed: bool
) -> None:
    stub.apps = {"a": "s"}
    policies = [policy("a", "gone" if n < gone else "a", 1000 + n) for n in range(total)]
    await store.create(policies, actor="test")
    refused = count("refused")
    if allowed:
        assert len(await cleaner.clean()) == gone
        return
    with pytest.raises(Refused, match=f"{gone} of {total} policies, more than cleanup_max_percent = 25 allows"):
        await cleaner.clean()
    assert count("refused") == refused + 1
    assert await store.list(Filter()) == policies
    assert len(await cleaner.clean(force=True)) == gone


async def test_an_empty_cloud_controller_removes_nothing(store: Store, cleaner: Cleaner) -> None:
    await store.create([policy(f"a{n}", f"b{n}") for n in range(30)], actor="test")
    with pytest.raises(Refused):
        await cleaner.clean()
    assert len(await store.list(Filter())) == 30


@pytest.mark.parametrize("fault", [500, 401, 403, 404, 302, "garbage", "list", "gone", "uaa"])
async def test_a_failure_removes_nothing(
    stub: CloudControllerStub, store: Store, cleaner: Cleaner, fault: str | int
) -> None:
    await store.create([policy("a", "x")], actor="test")
    if fault == "gone":
        stub.stop()
    elif fault == "uaa":
        stub.uaa.fault = 500
    else:
        stub.fault = fault
    failed = count("failed")
    with pytest.raises(Unavailable):
        await cleaner.clean(force=True)
    assert count("failed") == failed + 1
    assert len(await store.list(Filter())) == 1
    stub.uaa.fault = None


@pytest.mark.parametrize(
    "answer",
    [
        {"pagination": {"total_pages": 1, "total_results": 2}, "resources": []},
        {"pagination": {"total_pages": 2, "total_results": 1}, "resources": []},
        {"pagination": {"total_pages": 1}, "resources": []},
        {"resources": []},
        {"pagination": {"total_pages": 1, "total_results": 0}},
        {
            "pagination": {"total_pages": 1, "total_results": 1},
            "resources": [{"guid": "never-asked-for", "relationships": {"space": {"data": {"guid": "s"}}}}],
        },
    ],
)
async def test_an_answer_that_is_not_whole_removes_nothing(
    stub: CloudControllerStub, store: Store, cleaner: Cleaner, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create([policy("a", "x")], actor="test")
    monkeypatch.setattr(stub, "_page", lambda *_: JSONResponse(answer))
    with pytest.raises(Unavailable):
        await cleaner.clean(force=True)
    assert len(await store.list(Filter())) == 1


async def test_who_may_not_write_any_more_does_not(store: Store, cleaner: Cleaner) -> None:
    await store.create([policy("a", "x")], actor="test")

    async def fence(_: DatabaseConnection) -> None:
        raise Deposed("over")

    with pytest.raises(Deposed):
        await cleaner.clean(fence=fence)
    assert len(await store.list(Filter())) == 1
