"""A replica's disk, its listeners, and servers that answer badly."""

import asyncio
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bus import subjects
from bus.connection import connect
from bus.decode import Fields
from bus.messages import Revision
from bus.tables import Update, cache
from bus.tables import replica as replicas
from bus.tables.follower import State
from bus.tables.table import Content
from bus.wire import encode, pack
from tests.bus.tables import cancel, centre, eventually, follower
from tests.nats_server import NatsServer

CONTENT = Content.of("epoch", Revision(3), {("a",): pack("1")})


def test_what_is_kept_is_what_is_found(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "notes.table"
    assert cache.load(path, "notes") is None
    cache.store(path, CONTENT, "notes", 100.0)
    found = cache.load(path, "notes")
    assert found is not None
    assert found.content == CONTENT
    assert 100.0 <= found.age < 200.0
    assert cache.load(path, "others") is None, "another table's"
    assert [file.name for file in path.parent.iterdir()] == ["notes.table"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"digest": b"another"},
        pytest.param({"confirmed_at": time.time() + 1e6}, id="confirmed in the future"),
        {"confirmed_at": float("nan")},
        {"entries": b"not zlib"},
        {"entries": zlib.compress(b"\x05")},
        {"entries": zlib.compress(b"\xc1")},
        {"revision": -1},
        {"epoch": None},
        {"version": [2, 0]},
    ],
    ids=str,
)
def test_a_cache_that_is_wrong_counts_as_none(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / "notes.table"
    right = {
        "version": [1, 0],
        "table": "notes",
        "epoch": "epoch",
        "revision": 3,
        "digest": CONTENT.digest,
        "confirmed_at": time.time(),
        "entries": zlib.compress(pack([[["a"], pack("1")]])),
    }
    path.write_bytes(encode(right))
    assert cache.load(path, "notes") is not None
    path.write_bytes(encode({**right, **wrong}))
    assert cache.load(path, "notes") is None


def test_a_clock_set_back_does_not_make_a_cache_fresh(tmp_path: Path) -> None:
    path = tmp_path / "notes.table"
    cache.store(path, CONTENT, "notes", -3600.0)
    assert cache.load(path, "notes") is None


async def test_a_listener_that_fails_ends_the_replica_loudly(nats_server: NatsServer, tmp_path: Path) -> None:
    def fail(update: Update[str]) -> None:
        if update.changes:
            raise RuntimeError("listener")

    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here, follower(nats_server.url) as there:
        await there.replica.usable()
        second = replicas.Replica(there.connection, there.replica._table)
        second.listen(fail)
        running = asyncio.create_task(second.run())
        await second.usable()
        await here.write(a="1")
        with pytest.raises(ExceptionGroup) as failed:
            await asyncio.wait_for(running, 30)
        assert failed.group_contains(RuntimeError, match="listener")
        await eventually(lambda: there.replica.entries == {("a",): "1"})


async def test_a_cache_that_cannot_be_written_harms_nothing_and_is_written_later(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas, "RETRY_SAVE_SECONDS", 0.2)
    folder = tmp_path / "cache"
    folder.write_text("a file where a folder should be")
    async with (
        centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here,
        follower(nats_server.url, folder / "notes.table") as there,
    ):
        await here.write(a="1")
        await eventually(lambda: "table cache not written" in caplog.text)
        assert there.replica.entries == {("a",): "1"}
        folder.unlink()
        await eventually((folder / "notes.table").exists)


async def test_an_unchanged_state_is_saved_again_as_it_is_confirmed(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "CONFIRM_SAVE_SECONDS", 0.1)
    path = tmp_path / "notes.table"
    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db"), follower(nats_server.url, path):
        await eventually(path.exists)
        first = path.read_bytes()
        await eventually(lambda: path.read_bytes() != first)


async def test_an_answer_that_drips_is_given_up(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas, "ANSWER_SECONDS", 1.0)
    caplog.set_level(logging.DEBUG, "bus.tables")
    async with connect(nats_server.url, role="server", name="dripping") as connection:
        asked: list[str] = []

        async def drip(reply: str) -> None:
            for part in range(1000):
                head = {"kind": "snapshot", "epoch": "e", "revision": 1, "digest": b"", "parts": 1000}
                await connection.publish(reply, {**head, "part": part, "data": b"x"})
                await asyncio.sleep(0.1)

        drops: list[asyncio.Task[None]] = []

        async def answer(_: str, __: Fields) -> Sequence[Mapping[str, Any]]:
            asked.append("again")
            return []

        await connection.serve_parts(subjects.table_fetch("notes"), answer, queue="publishers")
        client = connection._client
        while client is None:
            await connection.wait_connected(30)
            client = connection._client

        async def spy(message: Any) -> None:
            drops.append(asyncio.create_task(drip(message.reply)))

        await client.subscribe(subjects.table_fetch("notes"), cb=spy)
        async with follower(nats_server.url, patience=2.0) as there:
            begun = time.monotonic()
            await asyncio.wait_for(there.replica.usable(), 30)
            assert there.replica.state is State.DEGRADED
            assert time.monotonic() - begun < 20
            await eventually(lambda: len(asked) > 1)
        for task in drops:
            await cancel(task)
