"""A container's log_config changes in Garden while it lives: record, enforcer and metadata store have it soon after."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.decode import Malformed
from bus.local import serving
from bus.messages import Handle
from services.networker.garden_client import GardenClient, GardenError, check_address
from services.networker.garden_sync import identity
from tests.networker.cell import PATIENCE, Cell, eventually
from tests.networker.store_reader import StoreReader

OLD = '{"guid":"g","index":0,"source_name":"APP","tags":{"a":"1"}}'
NEW = '{"guid":"g","index":0,"source_name":"APP","tags":{"a":"2"}}'


class Guardian:
    """Garden's API server, of the routes that are asked for, with its answers' types."""

    def __init__(self, listener: socket.socket) -> None:
        self.containers: dict[str, Any] = {}
        self.calls: list[str] = []
        self.down = False
        self._listener = listener
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    def __enter__(self) -> "Guardian":
        self._thread.start()
        assert self._started.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        self._loop.close()

    async def _serve(self) -> None:
        routes = [
            Route("/ping", self._ping),
            Route("/containers", self._list),
            Route("/containers/{handle}/properties", self._properties),
        ]
        async with serving(Starlette(routes=routes), self._listener):
            self._started.set()
            await self._stop.wait()

    async def _ping(self, _: Request) -> Response:
        self.calls.append("ping")
        return Response(status_code=503) if self.down else JSONResponse({})

    async def _list(self, _: Request) -> Response:
        return JSONResponse({"Handles": list(self.containers)})

    async def _properties(self, request: Request) -> Response:
        handle = request.path_params["handle"]
        self.calls.append(handle)
        if (properties := self.containers.get(handle, KeyError)) is KeyError:
            error = {"Type": "ContainerNotFoundError", "Message": f"unknown handle: {handle}", "Handle": handle}
            return JSONResponse(error, status_code=404)
        return JSONResponse(properties)


@pytest.fixture
def guardian(cell: Cell) -> Iterator[Guardian]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(cell.folder / "garden.sock"))
        with Guardian(listener) as guardian:
            yield guardian


def start(cell: Cell, **settings: object) -> Path:
    store = cell.folder / "store.json"
    address = cell.folder / "garden.sock"
    cell.start(**{"metadata_store": store, "garden_address": address, "garden_sync_interval": 0.2, **settings})
    return store


def log_config(cell: Cell, handle: str = "c1") -> object:
    record = cell.records.get(Handle(handle))
    assert record is not None
    return record.metadata.get("log_config")


def passes(guardian: Guardian) -> None:
    """Wait until Garden has been looked at wholly once more."""
    begun = guardian.calls.count("ping")
    eventually("two more passes have begun", lambda: guardian.calls.count("ping") >= begun + 2)


@pytest.mark.kernel
def test_a_change_gets_everywhere(cell: Cell, guardian: Guardian) -> None:
    store = StoreReader(start(cell))
    for handle in ("c1", "c2", "c3"):
        cell.cni("ADD", handle, config={"metadata": {"app_id": "x", "log_config": OLD}})
    reordered = json.dumps(dict(reversed(json.loads(OLD).items())))
    guardian.containers |= {
        "c1": {"log_config": OLD, "network.app_id": "x"},
        "c2": {"log_config": reordered},
        "c3": None,  # a container without properties, as Go says it
        "unknown": {"log_config": NEW},
    }
    passes(guardian)
    cell.seen("c1")
    passes(guardian)
    assert not [target for target in cell.seen("c1") if target == "/admit"]

    guardian.containers["c1"] = {"log_config": NEW}
    eventually("the record has it", lambda: log_config(cell) == NEW)
    eventually("the enforcer has it", lambda: cell.neighbours.admitted["c1"]["metadata"]["log_config"] == NEW)
    eventually("the store has it", lambda: store.read()["c1"]["metadata"] == {"app_id": "x", "log_config": NEW})
    assert [log_config(cell, handle) for handle in ("c2", "c3")] == [OLD, OLD]
    assert "unknown" not in guardian.calls
    assert sorted(record.handle for record in cell.records.all()) == ["c1", "c2", "c3"]

    # A container that Garden has no more is the runtime's to remove.
    guardian.containers.clear()
    passes(guardian)
    assert cell.agrees()
    assert len(cell.records.all()) == 3


@pytest.mark.kernel
def test_garden_away_and_what_it_should_not_say(cell: Cell, guardian: Guardian) -> None:
    guardian.down = True
    start(cell)
    cell.cni("ADD", "c1", config={"metadata": {"log_config": OLD}})
    cell.cni("ADD", "c2")
    log = cell.folder / "networker.log"
    eventually("it is said", lambda: "GET /ping: answered 503" in log.read_text())
    guardian.containers |= {"c1": {"log_config": "banana"}, "c2": {"log_config": 7}}
    guardian.down = False
    eventually("both are said", lambda: log.read_text().count("its log_config is not taken over") >= 2)
    assert (log_config(cell, "c1"), log_config(cell, "c2")) == (OLD, None)

    # What the enforcer refuses is as it was, and is tried again.
    cell.neighbours.refuse["/admit"] = (503, "not ready")
    guardian.containers["c2"] = {"log_config": NEW}
    eventually("that is said", lambda: "not taken over yet" in log.read_text())
    cell.neighbours.refuse.clear()
    eventually("then it has it", lambda: log_config(cell, "c2") == NEW)
    eventually("nothing is left half changed", cell.agrees)


@pytest.mark.kernel
def test_killed_while_changing(cell: Cell, guardian: Guardian) -> None:
    cell.start()
    cell.cni("ADD", "c1", config={"metadata": {"log_config": OLD}})
    cell.kill()
    guardian.containers["c1"] = {"log_config": NEW}
    settings = {"garden_address": cell.folder / "garden.sock", "failpoints": "networker.change.after-record=kill"}
    cell.start(**settings, expect_death=True)  # type: ignore[arg-type]
    cell.start()
    eventually("the enforcer has it", lambda: cell.neighbours.admitted["c1"]["metadata"].get("log_config") == NEW)
    assert log_config(cell) == NEW


@pytest.mark.kernel
def test_no_garden_at_all(cell: Cell) -> None:
    start(cell, garden_address="127.0.0.1:1")
    assert cell.cni("ADD")[0] == 0
    log = cell.folder / "networker.log"
    eventually("it is said", lambda: "see that Garden runs, and garden_address" in log.read_text())
    assert not cell.ended


async def test_garden_by_tcp() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with Guardian(listener) as guardian:
            guardian.containers |= {"a b/c": {"log_config": NEW}, "listed": ["no", "mapping"]}
            client = GardenClient(f"127.0.0.1:{listener.getsockname()[1]}")
            await client.ping()
            assert await client.handles() == {"a b/c", "listed"}
            assert await client.properties("gone") is None
            with pytest.raises(GardenError, match="properties of listed: must be a mapping"):
                await client.properties("listed")
            await client.close()


def test_what_counts_of_a_log_config() -> None:
    assert identity(OLD) != identity(NEW)
    assert identity('{"guid":"g"}') == identity('{"tags":null,"source_name":"","index":0,"guid":"g","else":1}')
    for other in (None, 7, "", "banana", "[]", "null", "[" * 100_000):
        assert identity(other) is None


@pytest.mark.parametrize(
    "address", ["/var/vcap/data/garden/garden.sock", "127.0.0.1:7777", "garden:7777", "[::1]:7777"]
)
def test_addresses(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("address", ["", "garden", "garden.sock", "http://127.0.0.1:7777", "a b:7"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(Malformed, match="garden_address"):
        check_address(address)
