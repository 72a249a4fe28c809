"""Killed servers, many clients at once, and the way from the API to a replica over a real bus."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from bus.connection import connect
from bus.tables import POLICIES as TABLE
from bus.tables import Replica
from tests.nats_server import NatsServer
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer, body, policy

PATIENCE = 60.0


def state(server: PolicyServer) -> tuple[set[str], set[str]]:
    """The apps in policies, and those that have a tag, as they are in SQL."""
    with sqlite3.connect(server.folder / "policy.db") as database:
        in_policies = {
            app for row in database.execute("SELECT source, destination FROM silkbus_policies") for app in row
        }
        tagged = {row[0] for row in database.execute("SELECT app FROM silkbus_tags WHERE freed_at IS NULL")}
    return in_policies, tagged


@pytest.mark.parametrize(
    ("failpoint", "kept"),
    [("policy.before-commit", False), ("policy.after-commit", True), ("policy.after-publish", True)],
)
def test_a_killed_server_keeps_what_it_committed_and_nothing_half(
    server: PolicyServer, failpoint: str, kept: bool
) -> None:
    wanted = body(*(policy("a", f"b{i}") for i in range(50)))
    server.start()
    with server.client() as client:
        assert client.post(POLICIES, json=body(policy("old", "b1"))).headers["X-Silkbus-Revision"] == "1"
    assert server.stop() == 0

    server.start(f"{failpoint}=kill")
    with server.client() as client, pytest.raises(httpx.HTTPError):
        client.post(POLICIES, json=wanted)
    server.wait_killed()

    server.start()
    with server.client() as client:
        assert client.get(POLICIES).json()["total_policies"] == (51 if kept else 1)
        in_policies, tagged = state(server)
        assert in_policies == tagged
        # A client that got no answer asks again: it is told the revision that has its policies, once.
        assert client.post(POLICIES, json=wanted).headers["X-Silkbus-Revision"] == "2"
        assert client.get(POLICIES).json()["total_policies"] == 51
        assert client.post(DELETE, json=wanted).headers["X-Silkbus-Revision"] == "3"
        assert state(server) == ({"old", "b1"}, {"old", "b1"})


async def test_concurrent_requests_make_revisions_without_a_gap(server: PolicyServer) -> None:
    await asyncio.to_thread(server.start)
    headers = {"Authorization": f"bearer {ADMIN_TOKEN}"}
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120, limits=limits) as client:
        answers = await asyncio.gather(
            *(client.post(POLICIES, json=body(policy(f"a{i}", f"b{i % 20}"))) for i in range(200))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert sorted(int(answer.headers["X-Silkbus-Revision"]) for answer in answers) == list(range(1, 201))
        assert (await client.get(POLICIES)).json()["total_policies"] == 200


async def until(replica: Replica[Any], wanted: dict[tuple[str, ...], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while {key: _plain(value) for key, value in replica.entries.items()} != wanted:
            await asyncio.sleep(0.01)


def _plain(value: Any) -> Any:
    return [ports.encode() for ports in value] if isinstance(value, tuple) else value


async def test_a_change_reaches_replicas_also_when_the_server_died_before_sending_it(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    server = PolicyServer(tmp_path, nats_server.url)
    try:
        await asyncio.to_thread(server.start)
        async with connect(nats_server.url, role="cell", name="c1") as connection:
            replica = Replica(connection, TABLE, cache=tmp_path / "cache" / "policies.table")
            following = asyncio.create_task(replica.run())
            with server.client() as client:
                client.post(POLICIES, json=body(policy("a", "b", 1, 2), policy("a", "b", 1, 2, "udp")))
            first = {
                ("policy", "b", "a"): [["tcp", 1, 2], ["udp", 1, 2]],
                ("tag", "a"): 1,
                ("tag", "b"): 2,
            }
            await until(replica, first)
            assert await asyncio.to_thread(server.stop) == 0

            await asyncio.to_thread(server.start, "policy.after-commit=kill")
            with server.client() as client, pytest.raises(httpx.HTTPError):
                client.post(POLICIES, json=body(policy("a", "c")))
            await asyncio.to_thread(server.wait_killed)
            await asyncio.to_thread(server.start)
            await until(replica, {**first, ("policy", "c", "a"): [["tcp", 8080, 8080]], ("tag", "c"): 3})
            following.cancel()
    finally:
        server.close()


def test_what_is_wrong_at_start_is_said_in_one_line(server: PolicyServer) -> None:
    server.tokens.unlink()
    with pytest.raises(AssertionError):
        server.start()
    assert f"silkbus-policy-server: token file {server.tokens}: cannot be read: No such file" in server.log
    assert "Traceback" not in server.log
