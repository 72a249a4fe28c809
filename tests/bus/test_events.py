"""The event stream over a real NATS server: what the stream holds is what the change log holds, once each, in order."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgpack
import nats
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.js.api import StreamConfig

from bus.connection import connect
from bus.database import open_database
from bus.events import Relay, stream
from bus.events.event import EventId, events_of, header_value
from bus.messages import Revision
from tests.bus.tables import Notes, cancel, dump, restore
from tests.nats_server import NatsServer

STREAM = "SILKBUS_NOTES"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    server.start()
    yield server
    server.stop()


@asynccontextmanager
async def notes_at(path: Path) -> AsyncIterator[Notes]:
    async with open_database(f"sqlite:///{path}") as database:
        notes = Notes(database)
        await notes.migrate()
        yield notes


@asynccontextmanager
async def relays(bus: NatsServer, notes: Notes, count: int = 1, **options: Any) -> AsyncIterator[list[Relay]]:
    async with AsyncExitStack() as stack:
        made = []
        for number in range(count):
            connection = await stack.enter_async_context(connect(bus.url, role="server", name=f"n{number}"))
            made.append(Relay(connection, notes.ledger, **options))
            stack.push_async_callback(cancel, asyncio.create_task(made[-1].run()))
        yield made


@asynccontextmanager
async def jetstream(bus: NatsServer) -> AsyncIterator[Any]:
    client = await nats.connect(bus.url, connect_timeout=10)
    try:
        yield client.jetstream(timeout=10)
    finally:
        await client.close()


async def messages(bus: NatsServer, name: str = STREAM) -> list[Any]:
    """All messages of the stream, in order; none when it is not there."""
    async with jetstream(bus) as js:
        try:
            state = (await js.stream_info(name)).state
        except nats.js.errors.NotFoundError:
            return []
        reading = (js.get_msg(name, at) for at in range(max(1, state.first_seq), state.last_seq + 1))
        found = await asyncio.gather(*reading, return_exceptions=True)
        kept = [message for message in found if not isinstance(message, nats.js.errors.NotFoundError)]
        assert not (failed := [message for message in kept if isinstance(message, BaseException)]), failed
        return kept


async def ids(bus: NatsServer) -> list[str]:
    return [(message.headers or {}).get("ce-id", "") for message in await messages(bus)]


async def logged(notes: Notes) -> list[str]:
    """The ids of all events of the change log, in order."""
    epoch, _ = await notes.ledger.head()
    entries = await notes.ledger.log_from(Revision(0), limit=100_000)
    return [str(event.id) for entry in entries for event in events_of("notes", epoch, entry)]


async def until_relayed(bus: NatsServer, notes: Notes, before: list[str] | None = None, timeout: float = 60) -> None:
    """Wait until the stream holds `before` and then the change log, exactly; fail at once if it never can."""
    wanted = (before or []) + await logged(notes)
    async with asyncio.timeout(timeout):
        while (found := await ids(bus)) != wanted:
            assert found == wanted[: len(found)], f"{found} is not the beginning of {wanted}"
            await asyncio.sleep(0.1)


async def test_an_event_has_the_form_of_a_cloudevent(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, relays(bus, notes):
        await notes.write({'naïve "note" %': "1", "b": "2"})
        await notes.write({"b": "3"})
        await until_relayed(bus, notes)
        first, second, third = await messages(bus)
        epoch, _ = await notes.ledger.head()
    headers = {name: unquote(value) for name, value in first.headers.items() if name.startswith("ce-")}
    number = headers.pop("ce-id")
    assert EventId.parse(number) is not None
    assert headers.pop("ce-time").endswith("+00:00")
    assert headers == {
        "ce-specversion": "1.0",
        "ce-source": f"/silkbus/notes/{epoch}",
        "ce-type": "org.silkbus.note.written.v1",
        "ce-subject": 'naïve "note" %',
        "ce-datacontenttype": "application/msgpack",
        "ce-revision": "1",
    }
    assert first.subject == "silkbus.event.notes.note.written"
    assert msgpack.unpackb(first.data) == {"version": [1, 0], "name": 'naïve "note" %'}
    assert [message.headers["ce-revision"] for message in (first, second, third)] == ["1", "1", "2"]
    assert [message.headers.get("ce-previous") for message in (first, second, third)] == [
        None,
        first.headers["ce-id"],
        second.headers["ce-id"],
    ]


async def test_relays_at_once_double_nothing_and_lose_nothing(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, relays(bus, notes, 3) as running:
        for number in range(60):
            await notes.write({f"a{number}": "x", f"b{number}": "y"})
            for relay in running:
                relay.wake()
        await until_relayed(bus, notes)
    assert len(await ids(bus)) == 120


async def test_a_long_log_is_carried_in_parts(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "notes.db") as notes:
        await notes.write({f"n{number}": "x" for number in range(1200)})  # one change of more than is sent at once
        for number in range(120):  # changes without an event, of more than is read at once
            await notes.write({f"n{number}": None})
        await notes.write({"last": "x"})
        async with relays(bus, notes, 2):
            await until_relayed(bus, notes)
    assert len(await ids(bus)) == 1201


def relay_process(bus: NatsServer, database: Path, failpoints: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bus.relay_process", bus.url, f"sqlite:///{database}"],
        env={**os.environ, "SILKBUS_FAILPOINTS": failpoints},
        cwd=ROOT,
        stderr=(database.parent / "relay.log").open("ab"),
    )


@pytest.mark.parametrize("point", ["events.before-publish", "events.after-publish"])
async def test_killed_relays_leave_no_gap_and_no_double(bus: NatsServer, tmp_path: Path, point: str) -> None:
    database = tmp_path / "notes.db"
    async with notes_at(database) as notes:
        for number in range(40):
            await notes.write({f"a{number}": "x", f"b{number}": "y"})
        for passing in (1, 2, 7):  # two at once, killed in the middle of each other's work
            pair = [relay_process(bus, database, f"{point}=kill:{passing}") for _ in range(2)]
            async with asyncio.timeout(60):
                while any(process.poll() is None for process in pair):
                    if (await ids(bus)) == await logged(notes):  # nothing left to be killed at
                        await notes.write({f"more{len(await ids(bus))}": "x"})
                    await asyncio.sleep(0.05)
            assert {process.returncode for process in pair} == {-signal.SIGKILL}
            found, wanted = await ids(bus), await logged(notes)
            assert found == wanted[: len(found)]
        async with relays(bus, notes):
            await until_relayed(bus, notes)


async def test_a_stream_wiped_while_the_bus_was_down_is_refilled(tmp_path: Path) -> None:
    bus = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    try:
        async with notes_at(tmp_path / "notes.db") as notes, relays(bus, notes, 2) as running:
            await notes.write({"a": "written while there is no bus"})
            for relay in running:
                relay.wake()
            bus.start()
            await until_relayed(bus, notes)
            bus.stop()
            shutil.rmtree(tmp_path / "jetstream")
            await notes.write({"b": "meanwhile"})
            bus.start()
            await until_relayed(bus, notes)
            assert len(await ids(bus)) == 2
    finally:
        bus.stop()


@pytest.mark.parametrize("how", ["purged", "deleted"])
async def test_a_stream_emptied_by_hand_is_refilled(bus: NatsServer, tmp_path: Path, how: str) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, relays(bus, notes, 2):
        await notes.write({"a": "1", "b": "2"})
        await until_relayed(bus, notes)
        before = await ids(bus)
        async with jetstream(bus) as js:
            await (js.purge_stream(STREAM) if how == "purged" else js.delete_stream(STREAM))
        async with asyncio.timeout(60):
            while await ids(bus) != before:
                await asyncio.sleep(0.1)


async def test_the_bus_cut_and_paused_in_the_middle(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, relays(bus, notes, 2) as running:

        async def write() -> None:
            for number in range(150):
                await notes.write({f"a{number}": "x"})
                running[number % 2].wake()
                await asyncio.sleep(0.02)

        writing = asyncio.create_task(write())
        await asyncio.sleep(0.5)
        bus.stop()
        bus.start()
        await asyncio.sleep(0.5)
        bus.pause()
        await asyncio.sleep(6)  # longer than a relay waits for an acknowledgement, which then comes late
        bus.resume()
        await writing
        await until_relayed(bus, notes)


async def test_restored_database_goes_on_after_what_both_have(bus: NatsServer, tmp_path: Path) -> None:
    database, early, later = tmp_path / "notes.db", tmp_path / "early", tmp_path / "later"
    async with notes_at(database) as notes:
        await notes.write({"a": "1"})
        await notes.write({"b": "2"})
    dump(database, early)
    async with notes_at(database) as notes, relays(bus, notes):
        for number in range(12):
            await notes.write({f"undone{number}": "x"})
        await until_relayed(bus, notes)
    dump(database, later)
    undone = await ids(bus)
    restore(database, early)
    async with notes_at(database) as notes, relays(bus, notes):
        await asyncio.sleep(2)
        assert await ids(bus) == undone  # nothing happened since: nothing to say
        await notes.write({"c": "3"})
        both, (new,) = (await logged(notes))[:2], (await logged(notes))[2:]
        await until_ids(bus, [*undone, new])
        *_, last = await messages(bus)
        assert last.headers["ce-previous"] == both[-1] != undone[-1]  # how a reader sees it
    restore(database, later)  # a newer dump: its last event is in the stream, but not at its end
    async with notes_at(database) as notes, relays(bus, notes):
        await notes.write({"d": "4"})
        newest = (await logged(notes))[-1]
        await until_ids(bus, [*undone, new, newest])


async def test_a_new_database_begins_its_own_history(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "one.db") as notes, relays(bus, notes):
        await notes.write({"a": "1"})
        await until_relayed(bus, notes)
    before = await ids(bus)
    async with notes_at(tmp_path / "two.db") as notes, relays(bus, notes, 2):
        await notes.write({"a": "1"})
        await until_relayed(bus, notes, before)
    assert len(set(await ids(bus))) == 2


async def until_ids(bus: NatsServer, wanted: list[str]) -> None:
    async with asyncio.timeout(60):
        while await ids(bus) != wanted:
            await asyncio.sleep(0.1)


async def test_messages_that_are_no_events_do_not_stop_it(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, relays(bus, notes), jetstream(bus) as js:
        await notes.write({"a": "1"})
        await until_relayed(bus, notes)
        (first,) = await ids(bus)
        await js.publish("silkbus.event.notes.junk", b"\xff", headers={"ce-id": "notes.1.7.nonsense"})
        await js.publish("silkbus.event.notes.junk", b"")
        await notes.write({"b": "2"})
        await until_ids(bus, [first, "notes.1.7.nonsense", "", (await logged(notes))[-1]])


async def test_a_full_stream_drops_its_oldest_and_goes_on(
    bus: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_EVENTS", 5)
    async with notes_at(tmp_path / "notes.db") as notes, relays(bus, notes, 2):
        for number in range(12):
            await notes.write({f"a{number}": "x"})
        await until_ids(bus, (await logged(notes))[-5:])
        await notes.write({"last": "x"})
        await until_ids(bus, (await logged(notes))[-5:])


async def test_without_jetstream_it_waits_and_says_so(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, relays(nats_server, notes) as (relay,):
        for number in range(20):
            outcome = await notes.write({f"a{number}": "x"})  # not held up
            relay.wake()
        assert outcome.revision == 20
        async with asyncio.timeout(30):
            while not (lines := [r for r in caplog.records if r.name == "bus.events.relay"]):
                await asyncio.sleep(0.05)
        assert "-js" in lines[0].about["advice"]  # type: ignore[attr-defined]
        assert len(lines) < 10  # committing does not make it try more often


async def test_each_reader_gets_a_consumer_also_after_a_wipe(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, jetstream(bus) as js:
        # One that is of the wrong kind must not stop the events.
        await js.add_stream(StreamConfig(name=STREAM, subjects=["silkbus.event.notes.>"]))
        await js.add_consumer(STREAM, durable_name="pushed", deliver_subject="somewhere")
        async with relays(bus, notes, 2, readers=["audit", "pushed"]):
            await notes.write({"a": "1"})
            await until_relayed(bus, notes)
            for _ in range(2):
                subscription = await js.pull_subscribe_bind("audit", STREAM)
                (message,) = await subscription.fetch(1, timeout=10)
                assert message.headers["ce-id"] == (await logged(notes))[0]
                await message.ack()
                await js.delete_stream(STREAM)
                await until_relayed(bus, notes)
                async with asyncio.timeout(30):
                    while not [c for c in await js.consumers_info(STREAM) if c.name == "audit"]:
                        await asyncio.sleep(0.1)


async def test_it_ends_whenever_it_is_told_to(bus: NatsServer, tmp_path: Path) -> None:
    async with notes_at(tmp_path / "notes.db") as notes, connect(bus.url, role="server", name="one") as connection:
        await notes.write({"a": "1"})
        await connection.wait_connected(10)
        for number in range(150):  # sooner or later when an answer comes, which used to be overheard one time in forty
            relay = asyncio.create_task(Relay(connection, notes.ledger).run())
            await asyncio.sleep(0.001 + number % 15 / 1000)
            relay.cancel()
            ended, _ = await asyncio.wait([relay], timeout=20)
            assert ended, f"the relay of round {number} goes on"


@given(st.text())
def test_header_values_are_plain_and_can_be_read_back(text: str) -> None:
    value = header_value(text)
    assert all(0x21 <= ord(character) <= 0x7E for character in value)
    assert not set('"') & set(value)
    assert unquote(value, errors="strict") == text


@given(st.text() | st.from_regex(r"notes\.\d{1,20}\.\d{1,10}\.[0-9a-f]{14,17}", fullmatch=True))
def test_an_id_is_read_as_it_was_written_or_not_at_all(text: str) -> None:
    found = EventId.parse(text)
    if found is not None:
        assert EventId.parse(str(found)) == found
