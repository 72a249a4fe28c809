"""What one of the policy servers does for all: with the servers' real processes."""

import asyncio
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from bus.certificates import Authority
from bus.connection import connect
from bus.decode import Malformed
from bus.messages import SecurityGroup
from bus.security_groups import GroupId
from bus.tables import SECURITY_GROUPS, Replica
from services.policy.upkeep import open_sources
from services.policy.upkeep_settings import UpkeepSettings
from tests.bus.tables import cancel
from tests.nats_server import NatsServer
from tests.policy.server import POLICIES, WRITE_TOKEN, PolicyServer, body, policy
from tests.policy.stubs import LOGIN, CloudControllerStub, Uaa, rule, security_group
from tests.policy.test_openapi import check

CLEANUP = f"{POLICIES}/cleanup"
PATH = "/networking/{version}/external/policies/cleanup"


@pytest.fixture
def make(stub: CloudControllerStub, tmp_path: Path) -> Iterator[Callable[..., PolicyServer]]:
    """Makes and starts servers on one database."""
    with ExitStack() as stack:
        number = 0

        def made(**settings: object) -> PolicyServer:
            nonlocal number
            number += 1
            folder = tmp_path / f"server-{number}"
            folder.mkdir()
            controller = {
                "uaa_url": stub.uaa.url,
                "uaa_client": LOGIN[0],
                "uaa_client_secret": LOGIN[1],
                "cc_url": stub.url,
                "cc_internal_url": stub.url,
                "database": f"sqlite:///{tmp_path}/policy.db",
                "asg_poll_interval_seconds": 1,
            }
            server = PolicyServer(folder, **{**controller, **settings})
            stack.callback(server.close)
            server.start()
            return server

        yield made


def readyz(server: PolicyServer) -> str:
    answer = httpx.get(f"{server.url}/readyz", timeout=30)
    assert answer.status_code == 200
    return answer.text


def metric(server: PolicyServer, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def leads(server: PolicyServer) -> bool:
    return metric(server, "silkbus_upkeep_leader") == 1


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def groups(server: PolicyServer) -> float:
    return metric(server, "silkbus_asg_groups")


def test_one_of_two_does_it_and_the_other_when_that_one_is_killed(
    stub: CloudControllerStub, make: Callable[..., PolicyServer]
) -> None:
    stub.groups = {"a": security_group("a", rule())}
    stub.last_update = "2026-11-23T10:00:00Z"
    servers = [make(), make()]
    wait_until(lambda: any(groups(server) == 1 for server in servers))
    (leader,) = [server for server in servers if leads(server)]
    (other,) = [server for server in servers if server is not leader]
    wait_until(lambda: "upkeep: by this server; security groups as of 20" in readyz(leader))
    assert "upkeep: by another server\n" in readyz(other)
    assert metric(other, 'silkbus_asg_syncs_total{outcome="changed"}') == 0
    assert leader.process is not None
    leader.process.send_signal(signal.SIGKILL)
    leader.process.wait(30)
    killed = time.monotonic()
    stub.groups["b"] = security_group("b")
    stub.last_update = "2026-11-23T10:00:07Z"
    wait_until(lambda: groups(other) == 2)
    print(f"taken over {time.monotonic() - killed:.1f} s after kill -9")
    assert metric(other, 'silkbus_asg_syncs_total{outcome="changed"}') == 1
    assert other.stop() == 0
    third = make()
    wait_until(lambda: leads(third), 30)
    assert "Traceback" not in other.log


def test_a_cloud_controller_that_is_away_is_said_and_harms_nobody(
    stub: CloudControllerStub, make: Callable[..., PolicyServer]
) -> None:
    stub.groups = {"a": security_group("a")}
    server = make()
    wait_until(lambda: groups(server) == 1)
    stub.fault = 500
    text = "the sync of security groups failed, what was there is kept: the Cloud Controller's internal API answered"
    wait_until(lambda: text in readyz(server))
    assert "security groups as of 20" in readyz(server)
    assert metric(server, 'silkbus_asg_syncs_total{outcome="failed"}') >= 1
    with server.client() as client:
        assert client.post(POLICIES, json=body(policy("a", "b"))).status_code == 200
        answer = client.post(CLEANUP)
        assert answer.status_code == 503
        assert answer.json()["error"].startswith("policies cleanup failed: the Cloud Controller answered with status")
        assert client.get(POLICIES).json()["total_policies"] == 1
    stub.fault = None
    wait_until(lambda: "failed" not in readyz(server))
    assert server.log.count("the sync of security groups failed, what was there is kept") == 1, "not each time"


def test_a_restored_database_is_brought_up_to_date(
    stub: CloudControllerStub, make: Callable[..., PolicyServer], tmp_path: Path
) -> None:
    """What was synced after the dump comes again, though the Cloud Controller says that nothing has changed."""
    stub.groups = {"a": security_group("a")}
    stub.last_update = "2026-11-23T10:00:00Z"
    server = make()
    wait_until(lambda: groups(server) == 1)
    with closing(sqlite3.connect(tmp_path / "policy.db")) as database, closing(sqlite3.connect(":memory:")) as dump:
        database.backup(dump)
        stub.groups["b"] = security_group("b")
        stub.last_update = "2026-11-23T10:00:01Z"
        wait_until(lambda: groups(server) == 2)
        skipped = 'silkbus_asg_syncs_total{outcome="skipped"}'
        before = metric(server, skipped)
        wait_until(lambda: metric(server, skipped) > before)
        dump.backup(database)
        rows = "SELECT guid FROM silkbus_security_groups ORDER BY guid"
        assert database.execute(rows).fetchall() == [("a",)]
        wait_until(lambda: database.execute(rows).fetchall() == [("a",), ("b",)])


def test_clean_up_on_demand(stub: CloudControllerStub, make: Callable[..., PolicyServer]) -> None:
    server = make()
    stub.apps = {"a": "s"}
    few = [policy("a", "a"), policy("a", "gone"), policy("gone", "a", 1, 9, "udp")]
    with server.client() as client:
        client.post(POLICIES, json=body(*few)).raise_for_status()
        answer = client.post(CLEANUP.replace("v1", "v0"))
        assert check(answer, PATH, "POST") == "200"
        assert answer.json() == {"total_policies": 2, "policies": few[1:]}, "the form of v1 in v0, too"
        assert client.post(CLEANUP).json() == {"total_policies": 0, "policies": []}
        (entry, *_) = client.get("/networking/v1/external/history").json()["history"]
        assert entry["user"] == "admin"
        client.post(POLICIES, json=body(*(policy("a", "gone", 1000 + n) for n in range(20)))).raise_for_status()
        answer = client.post(CLEANUP)
        assert check(answer, PATH, "POST") == "409"
        assert "20 of 21 policies, more than cleanup_max_percent = 25 allows" in answer.json()["error"]
        assert client.get(POLICIES).json()["total_policies"] == 21
        assert client.post(CLEANUP, params={"force": "true"}).json()["total_policies"] == 20
    for token, status in ((WRITE_TOKEN, 403), ("wrong", 401)):
        with server.client(token) as client:
            assert client.post(CLEANUP).status_code == status
    assert "deleting stale policies" in server.log
    assert "clean-up refused" in server.log


def test_clean_up_from_time_to_time(stub: CloudControllerStub, make: Callable[..., PolicyServer]) -> None:
    stub.apps = {"a": "s"}
    server = make(cleanup_interval=1)
    with server.client() as client:
        client.post(POLICIES, json=body(policy("a", "a"), policy("a", "gone"))).raise_for_status()
        wait_until(lambda: client.get(POLICIES).json()["total_policies"] == 1)
        assert client.get("/networking/v1/external/history").json()["history"][0]["user"] == "policy-cleaner"
        many = body(*(policy("a", "gone", 1000 + n) for n in range(20)))
        client.post(POLICIES, json=many).raise_for_status()
        wait_until(lambda: "the clean-up of policies failed, what was there is kept" in readyz(server))
        assert client.get(POLICIES).json()["total_policies"] == 21


async def test_from_the_cloud_controller_to_a_replica(
    stub: CloudControllerStub, make: Callable[..., PolicyServer], nats_server: NatsServer
) -> None:
    stub.last_update = "2026-11-23T10:00:00Z"
    await asyncio.to_thread(make, nats=nats_server.url)
    async with connect(nats_server.url, role="cell", name="one") as connection:
        replica = Replica(connection, SECURITY_GROUPS)
        task = asyncio.create_task(replica.run())
        times = []
        try:
            await asyncio.wait_for(replica.usable(), 60)
            for number in range(5):
                guid = GroupId(f"g{number}")
                changed = time.monotonic()
                stub.groups[guid] = security_group(guid, rule(), running_spaces=["s"])
                stub.last_update = f"2026-11-23T10:01:{number:02}Z"
                async with asyncio.timeout(60):
                    while (guid,) not in replica.entries:
                        await asyncio.sleep(0.01)
                times.append(time.monotonic() - changed)
                await asyncio.sleep(0.3)
        finally:
            await cancel(task)
        value = replica.entries[("g4",)]
        assert isinstance(value, SecurityGroup)
        assert value.running_spaces == {"s"}
        print(f"from the Cloud Controller to a cell with a look each second: {[f'{t:.2f}' for t in times]} s")


async def test_the_internal_api_is_asked_with_a_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    authority.ensure()
    server, client = ((tmp_path / f"{name}.crt", tmp_path / f"{name}.key") for name in ("server", "client"))
    authority.issue(*server, names=["IP:127.0.0.1"], usage="serverAuth")
    authority.issue(*client, names=["DNS:policy-server"], usage="clientAuth")
    uaa = Uaa()
    stub = CloudControllerStub(uaa, server)
    stub.clients = authority.certificate
    stub.last_update = "2026-11-23T10:00:00Z"
    uaa.start()
    stub.start()
    try:
        given: dict[str, Any] = {
            "tokens": tmp_path / "tokens.json",
            "uaa_url": uaa.url,
            "uaa_client": LOGIN[0],
            "uaa_client_secret": LOGIN[1],
            "cc_url": stub.url,
            "cc_internal_url": stub.url,
            "cc_internal_ca_cert": authority.certificate,
        }
        own = {"cc_internal_client_cert": client[0], "cc_internal_client_key": client[1]}
        async with open_sources(UpkeepSettings(**given, **own)) as sources:
            assert sources is not None
            assert sources.internal is not None
            answer = await sources.internal.get("/internal/v4/asg_latest_update")
            assert answer.body == b'{"last_update":"2026-11-23T10:00:00Z"}'
        (request,) = stub.asked
        assert request.headers["authorization"] == "bearer own-0"
        with pytest.raises(Malformed, match="cannot be used"):
            async with open_sources(UpkeepSettings(**given, **{**own, "cc_internal_client_key": tmp_path / "none"})):
                pass
    finally:
        stub.stop()
        uaa.stop()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"cleanup_interval": -1}, "cleanup_interval: must not be negative"),
        ({"asg_poll_interval_seconds": -1}, "asg_poll_interval_seconds: must not be negative"),
        ({"cleanup_max_percent": 101}, "cleanup_max_percent: must be in 0..100, not 101"),
        ({"cc_internal_url": "https://api:9023"}, "cc_internal_url: needs cc_url"),
        (
            {
                "cc_internal_url": "api:9023",
                "cc_url": "https://api",
                "uaa_url": "https://u",
                "uaa_client": "c",
                "uaa_client_secret": "s",
            },
            "cc_internal_url: 'api:9023' is not an address",
        ),
        ({"cc_internal_client_cert": Path("c")}, "cc_internal_client_cert, cc_internal_client_key: set both or none"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(Malformed, match=re.escape(text)):
        UpkeepSettings(tokens=Path("t"), **wrong)
