"""Tables over a real NATS server and SQLite: what SQL holds is what replicas hold, whatever happens to either."""

import asyncio
import os
from pathlib import Path

import msgpack

from bus.tables.cache import load
from bus.tables.follower import State
from tests.bus.tables import centre, dump, eventually, follower, restore
from tests.nats_server import NatsServer


async def test_a_change_arrives_and_a_late_replica_gets_it_all(nats_server: NatsServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/notes.db"
    async with centre(nats_server.url, url) as here, follower(nats_server.url) as early:
        await early.replica.usable()
        assert early.replica.state == State.LIVE
        await here.write(a="1", b="2")
        await here.write(a=None)
        await eventually(lambda: early.replica.revision == 2)
        assert early.replica.entries == {("b",): "2"}
        assert [dict(update.changes) for update in early.updates if update.changes] == [
            {("a",): "1", ("b",): "2"},
            {("a",): None},
        ]
        async with follower(nats_server.url) as late:
            await late.replica.usable()
            assert (late.replica.revision, late.replica.entries) == (2, {("b",): "2"})


async def test_a_write_that_changes_nothing_has_no_revision(nats_server: NatsServer, tmp_path: Path) -> None:
    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here:
        first, again = await here.write(a="1"), await here.write(a="1")
    assert (first.revision, first.changed) == (1, True)
    assert (again.revision, again.changed) == (1, False)


async def test_a_server_that_died_before_publishing_is_heard_through_another(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/notes.db"
    async with centre(nats_server.url, url) as here, follower(nats_server.url) as there:
        await there.replica.usable()
        await here.notes.write({"a": "committed, never published"})
        await eventually(lambda: there.replica.entries == {("a",): "committed, never published"})


async def test_what_is_too_large_for_a_message_is_fetched_in_parts(nats_server: NatsServer, tmp_path: Path) -> None:
    noise = os.urandom(1_500_000).hex()  # incompressible enough to need several parts
    async with (
        centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here,
        follower(nats_server.url) as there,
    ):
        await there.replica.usable()
        await here.write(large=noise)
        await eventually(lambda: there.replica.entries.get(("large",)) == noise)


async def test_starting_before_the_bus_and_losing_it(tmp_path: Path) -> None:
    nats = NatsServer(tmp_path)
    url = f"sqlite:///{tmp_path}/notes.db"
    async with centre(nats.url, url) as here, follower(nats.url) as there:
        await here.write(a="1")
        nats.start()
        try:
            await there.replica.usable()
            assert there.replica.entries == {("a",): "1"}
            nats.stop()
            await here.write(a="2")
            nats.start()
            await eventually(lambda: there.replica.entries == {("a",): "2"})
            nats.pause()
            await here.write(a="3")
            await eventually(lambda: not there.connection.connected)  # a silent peer is noticed
            nats.resume()
            await eventually(lambda: there.replica.entries == {("a",): "3"})
        finally:
            nats.stop()


async def test_restored_database_is_followed(nats_server: NatsServer, tmp_path: Path) -> None:
    database = tmp_path / "notes.db"
    url = f"sqlite:///{database}"
    async with follower(nats_server.url) as there:
        async with centre(nats_server.url, url) as here:
            await here.write(a="old")
        dump(database, tmp_path / "dump")
        async with centre(nats_server.url, url) as here:
            await here.write(a="new", b="gone later")
            await eventually(lambda: there.replica.revision == 2)
        restore(database, tmp_path / "dump")
        async with centre(nats_server.url, url) as here:
            await eventually(lambda: there.replica.entries == {("a",): "old"})
            await here.write(c="3")
            await eventually(lambda: there.replica.entries == {("a",): "old", ("c",): "3"})


async def test_starts_from_its_cache_when_the_centre_is_gone(nats_server: NatsServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "notes.table"
    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here:
        await here.write(a="1")
        async with follower(nats_server.url, cache) as there:
            # First it may be kept as it was when the follower found it: before the change.
            await eventually(lambda: (found := load(cache, "notes")) is not None and found.content.revision == 1)
    async with follower(nats_server.url, cache, patience=1) as there:
        await there.replica.usable()
        assert (there.replica.state, there.replica.entries) == (State.CACHED, {("a",): "1"})
    async with follower(nats_server.url, cache, max_stale=0.001, patience=1) as there:
        await there.replica.usable()
        assert (there.replica.state, there.replica.entries) == (State.DEGRADED, {})
    cache.write_bytes(cache.read_bytes()[:-20])
    async with follower(nats_server.url, cache, patience=1) as there:
        await there.replica.usable()
        assert (there.replica.state, there.replica.entries) == (State.DEGRADED, {})


async def test_junk_on_the_bus_is_refused_and_harms_nobody(nats_server: NatsServer, tmp_path: Path) -> None:
    junk = [b"", b"\xc1", b"\xff" * 100, msgpack.packb([1]), msgpack.packb({"version": [9, 0]})]
    junk += [msgpack.packb({"version": [1, 7], "epoch": 3}), msgpack.packb({"version": [1, 0], "epoch": "x"})]
    async with (
        centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here,
        follower(nats_server.url) as there,
    ):
        await there.replica.usable()
        for data in junk:
            for what in ("change", "heartbeat", "fetch"):
                await there.connection.publish_bytes(f"silkbus.table.notes.{what}", data)
        await here.write(a="1")
        await eventually(lambda: there.replica.entries == {("a",): "1"})


async def test_two_servers_and_many_writers_give_revisions_without_a_gap(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/notes.db"
    async with (
        centre(nats_server.url, url) as one,
        centre(nats_server.url, url) as two,
        follower(nats_server.url) as there,
    ):
        await there.replica.usable()
        outcomes = await asyncio.gather(
            *(
                server.write(**{f"{name}{number}": "x"})
                for number in range(40)
                for name, server in (("a", one), ("b", two))
            )
        )
        assert sorted(outcome.revision for outcome in outcomes) == list(range(1, 81))
        await eventually(lambda: there.replica.revision == 80)
        assert there.replica.entries == await one.notes.content()
        assert sum(len(update.changes) for update in there.updates) == 80


async def test_the_same_request_id_is_carried_out_once(nats_server: NatsServer, tmp_path: Path) -> None:
    async with centre(nats_server.url, f"sqlite:///{tmp_path}/notes.db") as here:
        first = await here.notes.write({"a": "1"}, request_id="r1")
        await here.notes.write({"a": None})
        again = await here.notes.write({"a": "1"}, request_id="r1")
        assert (first.revision, again.revision, again.changed) == (1, 1, False)
        assert await here.notes.content() == {}
