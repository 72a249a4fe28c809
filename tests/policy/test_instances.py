"""Asking all cells what becomes of a flow, over a real nats-server, with cells that answer, lie, and keep silent."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from bus import subjects
from bus.connection import Connection, connect
from bus.explaining import CellAnswer, Instance, Outcome, Probe, Question, Verdict
from bus.messages import AppId, CellName, Handle, Protocol, Revision
from bus.wire import decode
from services.policy.explain import Explanation, Flow
from services.policy.explain_http import encode
from services.policy.instances import ANSWER_SECONDS, Instances
from tests.nats_server import NatsServer

FLOW = Flow(AppId("web"), AppId("db"), Protocol.TCP, 8080)
WEB = Instance(Handle("web-0"), IPv4Address("10.255.1.2"), Verdict.PASSES, "goes out", "sb-out", "-j ACCEPT", True)
DB = Instance(Handle("db-0"), IPv4Address("10.255.2.2"), Verdict.REFUSED, "no policy", kernel_agrees=False)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.stop()


class Cell:
    """Answers as it is told to, and remembers what it was asked."""

    def __init__(self, connection: Connection, name: str, answer: CellAnswer, speaks_as: str | None = None) -> None:
        self._connection = connection
        self._subject = subjects.cell(CellName(speaks_as or name), "explained")
        self._answer = answer
        self.asked: list[Question] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def hear(self, subject: str, data: bytes) -> None:
        question = Question.decode(decode(data, subject))
        self.asked.append(question)
        answer = replace(self._answer, id=question.id)
        if question.targets:
            probes = tuple(Probe(target, Outcome.CONNECTED, 1.0) for target in question.targets)
            answer = replace(answer, sources=tuple(replace(i, probes=probes) for i in answer.sources))
        self._tasks.add(asyncio.create_task(self._connection.publish(self._subject, answer.encode())))


@asynccontextmanager
async def foundation(
    bus: NatsServer, cells: dict[str, CellAnswer | None], speaks_as: dict[str, str] | None = None
) -> AsyncIterator[tuple[Instances, dict[str, Cell]]]:
    """A policy server's instances, and cells that hold a lease; those without an answer keep silent."""
    made: dict[str, Cell] = {}
    async with AsyncExitStack() as stack:
        for name, answer in cells.items():
            if answer is None:
                continue
            connection = await stack.enter_async_context(connect(bus.url, role="cell", name=name))
            assert await connection.wait_connected(10)
            made[name] = Cell(connection, name, answer, (speaks_as or {}).get(name))
            await connection.listen(subjects.EXPLAIN, made[name].hear)
            assert connection._client is not None
            await connection._client.flush()
        server = await stack.enter_async_context(connect(bus.url, role="policy-server", name="one"))
        assert await server.wait_connected(10)
        leased = [CellName(name) for name in cells]
        instances = Instances(server, lambda: leased)
        await instances.listen()
        assert server._client is not None
        await server._client.flush()
        yield instances, made


def answer(name: str, **ends: Any) -> CellAnswer:
    return CellAnswer("", CellName(name), Revision(7), **ends)


async def test_all_answers_come_together_as_soon_as_the_last_is_there(bus: NatsServer) -> None:
    cells = {"c1": answer("c1", sources=(WEB,)), "c2": answer("c2", destinations=(DB,)), "c3": answer("c3")}
    async with foundation(bus, cells) as (instances, made):
        began = time.monotonic()
        asked = await instances.ask(FLOW)
        assert asked is not None
        assert time.monotonic() - began < ANSWER_SECONDS
        assert [(each.cell, each.sources, each.destinations) for each in asked.answers] == [
            ("c1", (WEB,), ()),
            ("c2", (), (DB,)),
            ("c3", (), ()),
        ]
        assert (asked.silent, asked.cells) == ((), 3)
        (question,) = made["c1"].asked
        assert (question.source, question.destination, question.port, question.targets) == ("web", "db", 8080, ())


async def test_who_is_silent_is_named_within_the_time(bus: NatsServer) -> None:
    async with foundation(bus, {"c1": answer("c1", sources=(WEB,)), "c2": None}) as (instances, _):
        began = time.monotonic()
        asked = await instances.ask(FLOW)
        assert asked is not None
        assert time.monotonic() - began < ANSWER_SECONDS + 5
        assert ([each.cell for each in asked.answers], asked.silent) == (["c1"], ("c2",))


async def test_the_subject_says_who_speaks_and_strangers_are_not_heard(bus: NatsServer) -> None:
    cells: dict[str, CellAnswer | None] = {"c1": answer("c1"), "c2": None}
    async with foundation(bus, {**cells}, speaks_as={"c1": "c9"}) as (instances, _):
        asked = await instances.ask(FLOW)
        assert asked is not None
        assert (asked.answers, asked.silent) == ((), ("c1", "c2"))


async def test_a_probe_is_asked_for_with_the_addresses_found(bus: NatsServer) -> None:
    cells = {"c1": answer("c1", sources=(WEB,)), "c2": answer("c2", destinations=(DB,))}
    async with foundation(bus, cells) as (instances, made):
        asked = await instances.ask(FLOW, probe=True)
        assert asked is not None
        assert [question.targets for question in made["c1"].asked] == [(), (DB.address,)]
        (source,) = asked.answers[0].sources
        assert source.probes == (Probe(DB.address, Outcome.CONNECTED, 1.0),)
        body = json.loads(encode(FLOW, Explanation(Revision(7), (), (), (), {}), asked, tag_length=2, names=True))
        assert body["source"]["instances"][0]["probes"][0]["outcome"] == "connected"
        assert body["destination"]["instances"][0] == {
            "cell": "c2",
            "revision": 7,
            "handle": "db-0",
            "address": "10.255.2.2",
            "verdict": "refused",
            "reason": "no policy",
            "chain": None,
            "rule": None,
            "kernel_agrees": False,
            "differences": [],
            "probes": None,
        }
        assert body["cells"] == {"asked": 2, "answered": 2, "silent": {"count": 0, "cells": []}, "problems": []}


async def test_a_cell_that_could_not_say_all_says_why_to_admins_alone(bus: NatsServer) -> None:
    async with foundation(bus, {"c1": answer("c1", problem="no ipset")}) as (instances, _):
        asked = await instances.ask(FLOW)
        nothing = Explanation(Revision(7), (), (), (), {})
        for admin in (True, False):
            cells = json.loads(encode(FLOW, nothing, asked, tag_length=2, names=admin))["cells"]
            assert cells.get("problems") == ([{"cell": "c1", "problem": "no ipset"}] if admin else None)


async def test_without_leases_or_bus_nothing_is_known(bus: NatsServer) -> None:
    async with connect(bus.url, role="policy-server", name="one") as server:
        assert await server.wait_connected(10)
        assert await Instances(server, lambda: None).ask(FLOW) is None
    async with connect("nats://127.0.0.1:1", role="policy-server", name="one") as server:
        assert await Instances(server, list).ask(FLOW) is None
