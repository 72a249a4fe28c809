"""Leases from the silk worker of the same cell, in place of the bus."""

import asyncio
from contextlib import AsyncExitStack, suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.local import Health, Service, application, serving_privately
from bus.messages import CellName, Lease
from bus.tables import Update
from services.enforcer import worker_leases
from services.enforcer.worker_leases import WorkerLeases
from tests.bus.tables import eventually


def lease(number: int, underlay: str) -> Lease:
    subnet = IPv4Network(f"10.255.{number}.0/24")
    return Lease(subnet, CellName(f"cell-{number}"), IPv4Address(underlay), f"ee:ee:0a:ff:{number:02x}:00")


async def test_they_are_what_the_worker_says_and_stay_while_it_is_silent(tmp_path: Path) -> None:
    answer: list[object] = [lease(1, "10.0.0.1").encode(), lease(2, "10.0.0.2").encode()]
    path = tmp_path / "silk" / "silk.sock"

    async def leases(_: Request) -> Response:
        return JSONResponse({"leases": answer})

    app = application([Route("/leases", leases)], Health())
    source = WorkerLeases(Service("silk", path))
    heard: list[Update[Lease]] = []
    source.listen(heard.append)
    running = asyncio.create_task(source.run())
    try:
        async with AsyncExitStack() as worker:
            await worker.enter_async_context(serving_privately(app, path))
            await source.usable()
            assert set(source.entries.values()) == {lease(1, "10.0.0.1"), lease(2, "10.0.0.2")}
            answer[:] = [lease(2, "10.0.0.3").encode()]
            await eventually(lambda: len(heard) == 2)
            assert heard[1].changes == {("10.255.1.0/24",): None, ("10.255.2.0/24",): lease(2, "10.0.0.3")}
            answer.append({"subnet": "nonsense"})
            await asyncio.sleep(2 * worker_leases.INTERVAL)
        await asyncio.sleep(2 * worker_leases.INTERVAL)
        assert (len(heard), list(source.entries.values())) == (2, [lease(2, "10.0.0.3")])
        answer[:] = []
        async with serving_privately(app, path):
            await eventually(lambda: len(heard) == 3)
            assert source.entries == {}
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
