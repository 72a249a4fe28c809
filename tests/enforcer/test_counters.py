"""Counters of policies, and the original agent's forced passes: real packets, both kinds of tables."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from pyroute2 import netns
from starlette.applications import Starlette

from bus.local import Health, application
from bus.process import KernelThread
from services.enforcer.counters import Counters
from services.enforcer.foreign_api import ForeignApi, forcing
from services.enforcer.logging_door import LoggingApi
from tests.enforcer.conftest import Enforcer, enforcing, tags, tcp, udp
from tests.enforcer.world import Box, Cell
from tests.nats_server import free_port

pytestmark = pytest.mark.kernel


@asynccontextmanager
async def counting(enforcer: Enforcer) -> AsyncIterator[Counters]:
    thread = KernelThread("counters")
    await thread.run(netns.setns, enforcer.cell.name)
    try:
        yield Counters(enforcer.reconciler, thread)
    finally:
        thread.close()


@asynccontextmanager
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://enforcer") as made:
        yield made


async def connects(source: Box, destination: Box, port: int, times: int) -> None:
    for _ in range(times):
        assert await asyncio.to_thread(source.reaches, destination, port)


async def test_flows_are_counted_by_policy_also_when_chains_are_written_anew(cell: Cell, kind: str) -> None:
    web, other, db = cell.box("web"), cell.box("other"), cell.box("db")
    for port in (7, 8):
        db.serve(port)
    known = {
        **tags(web=5, other=7, db=6),
        ("policy", "db", "web"): (tcp(7), tcp(8)),
        ("policy", "db", "other"): (tcp(7),),
    }
    async with (
        enforcing(cell, kind, known=known) as enforcer,
        counting(enforcer) as counters,
        client(application(counters.routes(), Health())) as api,
    ):

        async def counted(**query: str) -> dict[Any, int]:
            answer = (await api.get("/counters", params=query)).raise_for_status().json()
            return {
                (item["source"], item["destination"], item["protocol"], item["start"], item["end"]): item["flows"]
                for item in answer["policies"]
            }

        await connects(web, db, 7, 3)
        await connects(web, db, 8, 1)
        await connects(other, db, 7, 2)
        assert not await asyncio.to_thread(other.reaches, db, 8)
        first = {("web", "db", "tcp", 7, 7): 3, ("web", "db", "tcp", 8, 8): 1, ("other", "db", "tcp", 7, 7): 2}
        assert await counted() == first
        assert await counted(source="other") == {("other", "db", "tcp", 7, 7): 2}
        assert await counted(destination="web") == {}
        refused = (await api.get("/counters")).json()["refused_packets"]
        assert refused["in"] >= 1
        assert refused["out"] == refused["revoked"] == 0
        # Another policy of the destination: its chain is written anew, and the kernel begins from nought.
        await enforcer.allow("web", "db", tcp(7), tcp(8), udp(9))
        await connects(web, db, 7, 1)
        assert (await counted())["web", "db", "tcp", 7, 7] == 4
        await connects(web, db, 7, 1)
        assert (await counted())["web", "db", "tcp", 7, 7] == 5
        await enforcer.allow("other", "db")
        assert {key for key in await counted() if key[0] == "other"} == set()


async def test_the_switch_of_the_original(cell: Cell) -> None:
    async with (
        enforcing(cell, "nft", known={}) as enforcer,
        client(application(LoggingApi(enforcer.reconciler).routes(), Health())) as api,
    ):
        assert (await api.get("/iptables-c2c-logging")).text == '{"enabled":false}'
        answer = await api.put("/iptables-c2c-logging", content='{"enabled":true}')
        assert (answer.status_code, answer.text) == (200, '{"enabled":true}')
        assert (await api.get("/iptables-c2c-logging")).text == '{"enabled":true}'
        assert "--nflog-prefix" in cell.exec("iptables-nft -S sb-accept")
        for body, words in (
            ("x", "decoding request body as json"),
            ('{"enabled":"yes"}', "decoding request body as json"),
            ("{}", "missing required key 'enabled'"),
        ):
            answer = await api.put("/iptables-c2c-logging", content=body)
            assert (answer.status_code, answer.text) == (400, f'{{ "error": "{words}" }}')
        assert (await api.get("/iptables-c2c-logging")).text == '{"enabled":true}'


async def test_forced_passes_mend_and_never_harm(cell: Cell, kind: str) -> None:
    web, db = cell.box("web"), cell.box("db")
    db.serve(7)
    known = {**tags(web=5, db=6), ("policy", "db", "web"): (tcp(7),)}
    port = free_port()
    async with enforcing(cell, kind, known=known) as enforcer:
        api = ForeignApi(enforcer.reconciler, dynamic=True)
        async with (
            forcing(api, "127.0.0.1", port),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as original,
        ):
            cell.exec(f"iptables-{kind} -F sb-to")
            answer = await original.get("/force-policy-poll-cycle")
            assert (answer.status_code, answer.content) == (200, b"")
            await connects(web, db, 7, 1)
            before = cell.saved(kind)
            for method in ("GET", "POST", "PUT"):
                for path, words in (("asgs-for-container", "updated container"), ("orphaned-asgs-cleanup", None)):
                    for name in (db.name, "no such <one>"):
                        answer = await original.request(method, f"/force-{path}", params={"container": name})
                        said = f"{words or 'cleaned up ASGs for container'} {name}"
                        assert (answer.status_code, answer.text) == (200, said)
                    answer = await original.request(method, f"/force-{path}")
                    assert (answer.status_code, answer.text) == (400, "no container specified")
            assert cell.saved(kind) == before
            await connects(web, db, 7, 1)


async def test_without_dynamic_groups_there_is_nothing_to_force(cell: Cell) -> None:
    async with enforcing(cell, "nft", known={}) as enforcer:
        app = ForeignApi(enforcer.reconciler, dynamic=False).application()
        async with client(app) as original:
            for path in ("/force-asgs-for-container?container=a", "/force-orphaned-asgs-cleanup"):
                answer = await original.get(path)
                assert (answer.status_code, answer.text) == (405, "ASG syncing has been disabled administratively")


async def test_no_port_no_listener(cell: Cell) -> None:
    async with (
        enforcing(cell, "nft", known={}) as enforcer,
        forcing(ForeignApi(enforcer.reconciler, dynamic=True), "256.256.256.256", 0),
    ):
        assert enforcer.reconciler.problem is None
