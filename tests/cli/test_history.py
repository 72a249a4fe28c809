"""history and events against a real policy server."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cli.arguments import api_parser
from cli.events import _Stream
from cli.session import Session
from cli.sse import Event
from tests.bus.tables import eventually
from tests.cli.conftest import Run
from tests.cli.running import WAIT, environment, run, started
from tests.policy.server import DELETE, POLICIES, WRITE_TOKEN, PolicyServer, body, policy
from tests.policy.test_status import Cells, bus, world

__all__ = ["bus", "world"]


def change(server: PolicyServer, path: str, *policies: Any) -> int:
    with server.client() as api:
        return int(api.post(path, json=body(*policies)).raise_for_status().headers["X-Silkbus-Revision"])


def test_history_by_app_user_and_time(silkbus: Run, standing_server: PolicyServer) -> None:
    first = change(standing_server, POLICIES, policy("guid-front", "guid-back"), policy("guid-front", "guid-db", 1, 9))
    change(standing_server, POLICIES, policy("guid-web-1", "x", 53, protocol="udp"))
    last = change(standing_server, DELETE, policy("guid-front", "guid-back"))
    result = silkbus("history", "--limit", "3")
    assert (result.code, result.err) == (0, "")
    header, *lines = [line.split(maxsplit=1) for line in result.out.splitlines()]
    assert header[0] == "revision"
    assert [line[0] for line in lines] == [str(last), str(first + 1), str(first), "+"]
    assert lines[0][1].endswith("admin   - acme/dev/front → acme/dev/back tcp 8080")
    assert lines[1][1].endswith("admin   + acme/dev/web → x udp 53")
    assert lines[3][1] == "acme/dev/front → acme/prod/db tcp 1-9"
    by_app = json.loads(silkbus("history", "--app", "back", "-o", "json").out)
    assert [entry["revision"] for entry in by_app][:2] == [last, first]
    assert by_app[0]["removed"][0]["source"] == {"guid": "guid-front", "name": "front", "space": "dev", "org": "acme"}
    assert by_app[0]["added"] == []
    assert json.loads(silkbus("history", "--user", "nobody", "-o", "json").out) == []
    assert len(json.loads(silkbus("history", "--since", "1h", "-o", "json", "--limit", "3").out)) == 3
    assert json.loads(silkbus("history", "--until", "1h", "-o", "json").out) == []
    assert json.loads(silkbus("history", "--since", "2999-01-01", "-o", "json").out) == []
    assert "revision: " in silkbus("history", "-o", "yaml").out


def test_history_is_read_page_by_page(standing_server: PolicyServer) -> None:
    for number in range(1, 4):
        change(standing_server, POLICIES, policy("pages", "y", number))
    from cli import history

    asked = []

    class Client:
        class server:  # noqa: N801 (an attribute's name)
            url = "http://nowhere"

        def get(self, path: str) -> Any:
            asked.append(path)
            with standing_server.client() as api:
                return api.get(f"/networking/v1/external{path}").json()

    page, history.PAGE = history.PAGE, 2
    try:
        found = list(history.fetch(Client(), {"app_id": "pages"}, 5))  # type: ignore[arg-type]
    finally:
        history.PAGE = page
    assert [entry["added"][0].start for entry in found] == [3, 2, 1]
    assert len(asked) == 2


def test_what_history_does_not_understand(silkbus: Run) -> None:
    for arguments, problem in (
        (["--since", "yesterday"], "a time is written as"),
        (["--limit", "0"], "--limit must be a whole number from 1 on"),
        (["--limit", "x"], "--limit must be a whole number from 1 on"),
        (["--app", "nobody"], "App 'nobody' not found"),
    ):
        result = silkbus("history", *arguments)
        assert result.code in (1, 2)
        assert problem in result.err
    refused = silkbus("history", SILKBUS_TOKEN=WRITE_TOKEN)
    assert refused.code == 1
    assert "do not include allowed scopes [network.admin]" in refused.err


def test_the_last_events(silkbus: Run, standing_server: PolicyServer) -> None:
    change(standing_server, POLICIES, policy("guid-front", "guid-back"))
    revision = change(standing_server, DELETE, policy("guid-front", "guid-back"))
    added, removed = silkbus("events", "--limit", "2").out.splitlines()
    assert "policy.added" in added
    assert removed.endswith(
        f"policy.removed   acme/dev/front → acme/dev/back tcp 8080  (revision {revision}  by admin)"
    )
    values = [json.loads(line) for line in silkbus("events", "--limit", "2", "-o", "json").out.splitlines()]
    assert [value["kind"] for value in values] == ["policy.added", "policy.removed"]
    assert values[0]["policy"]["destination"]["name"] == "back"
    assert silkbus("events", "--limit", "2", "-o", "yaml").out.startswith("---\nkind: policy.added\n")


async def test_events_are_followed_and_none_is_missed_or_told_twice(
    world: tuple[PolicyServer, Cells], tmp_path: Path
) -> None:
    server, cells = world
    variables = environment(server, tmp_path)
    change(server, POLICIES, policy("guid-front", "guid-back", 1))
    async with started(variables, "events", "--follow", "-o", "json") as events:
        assert (await events.value())["policy"]["ports"] == {"start": 1, "end": 1}
        change(server, POLICIES, policy("guid-front", "guid-back", 2), policy("guid-front", "guid-back", 3))
        assert [(await events.value())["policy"]["ports"]["start"] for _ in range(2)] == [2, 3]
        async with cells.cell("c", 3):
            lease = await events.value()
            assert (lease["kind"], lease["data"]["cell"]) == ("lease.acquired", "c")
        assert server.process is not None
        server.process.kill()
        await asyncio.to_thread(server.process.wait)
        await asyncio.to_thread(server.start)
        change(server, DELETE, policy("guid-front", "guid-back", 1))
        change(server, POLICIES, policy("guid-front", "guid-back", 4))
        told = []
        while len(told) < 2:
            value = await events.value()
            if value["kind"].startswith("policy."):  # leases are told again by a server that hears of them anew
                told.append((value["kind"], value["policy"]["ports"]["start"]))
        assert told == [("policy.removed", 1), ("policy.added", 4)]
        events.process.send_signal(2)
        assert (await events.ended()).code == 130


async def test_a_burst_while_the_stream_begins_is_told_once_and_in_order(
    world: tuple[PolicyServer, Cells], tmp_path: Path
) -> None:
    server, _ = world
    variables = environment(server, tmp_path)
    done = asyncio.Event()

    async def burst() -> int:
        number = 0
        while not done.is_set():
            number += 1
            await asyncio.to_thread(change, server, POLICIES, policy("guid-front", "guid-back", number))
        return number

    bursting = asyncio.create_task(burst())
    try:
        async with started(variables, "events", "--follow", "--limit", "1", "-o", "json") as events:
            first = (await events.value())["policy"]["ports"]["start"]
            told = [(await events.value())["policy"]["ports"]["start"] for _ in range(50)]
            assert told == list(range(first + 1, first + 51))
    finally:
        done.set()
        await bursting


def test_what_is_committed_before_the_stream_begins_is_told_first(
    environment: dict[str, str], home: Path, standing_server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**environment, "HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    told: list[int] = []

    class Printer:
        def show(self, event: Event) -> None:
            told.append(event.data["data"]["ports"][1])

    parsed = api_parser("events", "").parse_args([])
    change(standing_server, POLICIES, policy("guid-front", "guid-back", 1))
    stream = _Stream(Session(parsed), Printer())  # type: ignore[arg-type]
    stream.begin(1)
    change(standing_server, POLICIES, policy("guid-front", "guid-back", 2))
    change(standing_server, POLICIES, policy("guid-front", "guid-back", 3))
    threading.Thread(target=stream.follow, daemon=True).start()
    deadline = time.monotonic() + WAIT
    number = 3
    while len(told) < 4 and time.monotonic() < deadline:
        number += 1  # until one comes after the stream has begun
        change(standing_server, POLICIES, policy("guid-front", "guid-back", number))
        time.sleep(1)
    assert told[:4] == [1, 2, 3, 4]


async def test_who_may_not_follow_is_told_so(world: tuple[PolicyServer, Cells], tmp_path: Path) -> None:
    server, _ = world
    result = await run(environment(server, tmp_path, WRITE_TOKEN), "events", "--follow")
    assert result.code == 1
    assert "do not include allowed scopes [network.admin]" in result.err
    await eventually(lambda: server.process is not None and server.process.poll() is None, WAIT)
