"""Many replicas that want the whole table at once: what the publisher sends, and to whom it says to come back later."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bus.tables import publisher
from bus.tables.publisher import ANSWERED
from tests.bus.tables import centre, eventually, follower
from tests.nats_server import NatsServer


def answered(kind: str) -> float:
    return float(ANSWERED.labels("notes", kind)._value.get())


async def test_a_snapshot_is_made_once_and_sent_with_what_changed_since(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def compress(changes: publisher.Changes) -> bytes:
        made.append(len(changes))
        return original(changes)

    original = publisher.compress
    monkeypatch.setattr(publisher, "compress", compress)
    monkeypatch.setattr(publisher, "MAX_SNAPSHOT_CHANGES", 3)
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db"))
        await here.write(**{f"n{number}": "first" for number in range(50)})
        await eventually(lambda: here.publisher.revision == 1)
        steps: list[dict[str, str | None]] = [{}, {"n1": "second"}, {"n2": None, "n1": "third"}, {"a": "1", "b": "2"}]
        for step in steps:
            if step:
                revision = (await here.write(**step)).revision
                await eventually(lambda revision=revision: here.publisher.revision == revision)
            late = await stack.enter_async_context(follower(nats_server.url))
            await late.replica.usable()
            assert late.replica.entries == await here.notes.content()
        # The table; it again, and one change; and two changes; four are too many, so it is made anew.
        assert made == [50, 1, 2, 51]


async def test_who_is_told_to_come_back_later_does(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MAX_WAITING", 0)
    before = answered("busy")
    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here:
        await here.write(a="1")
        async with follower(nats_server.url) as there:
            await eventually(lambda: answered("busy") > before + 1)
            assert there.replica.entries == {}
            monkeypatch.undo()
            await there.replica.usable()
            assert there.replica.entries == {("a",): "1"}


async def test_many_at_once_while_little_may_wait_to_be_sent(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MAX_BACKLOG_BYTES", 0)
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db"))
        await here.write(**{f"n{number}": f"{number:x}" * 1000 for number in range(1000)})
        entering = (stack.enter_async_context(follower(nats_server.url)) for _ in range(20))
        cells = [await cell for cell in entering]
        await asyncio.gather(*(cell.replica.usable() for cell in cells))
        await here.write(n1="last")
        expected = await here.notes.content()
        await eventually(lambda: all(cell.replica.entries == expected for cell in cells))
