"""Attacks with stolen certificates on a real nats-server that runs with what `silkbus nats-config` wrote.

And that everybody can still do their own work there.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import nats.errors
import pytest
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from bus import subjects
from bus.connection import Connection, connect
from bus.credentials import Credentials
from bus.permissions import CELL, OPERATOR, POLICY_SERVER, READER, SILK_CONTROLLER
from bus.wire import encode
from tests.bus.guarded import NOTES_AS_POLICIES, Guarded, barrier, thief
from tests.bus.tables import centre, eventually, follower

STREAM = subjects.event_stream("policies")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded.make(tmp_path_factory.mktemp("guarded"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Guarded]:
    """A server of the test's own, to reconfigure."""
    made = Guarded.make(tmp_path)
    made.start()
    yield made
    made.stop()


NOBODY_PUBLISHES = [
    "_INBOX.cell.cell-2.x",
    "_INBOX.policy-server.one.x",
    "silkbus.table.policies",
    "silkbus.other",
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.CREATE.MINE",
    f"$JS.API.STREAM.DELETE.{STREAM}",
    f"$JS.API.STREAM.MSG.DELETE.{STREAM}",
    f"$JS.API.CONSUMER.DELETE.{STREAM}.r2",
    f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.r2",
    f"$JS.ACK.{STREAM}.r2.1.1.1.1.1",
    f"$JS.FC.{STREAM}.r2.x",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.ACCOUNT.SILKBUS.INFO",
]
ONLY_THE_CENTRE_PUBLISHES = [
    "silkbus.table.policies.change",
    "silkbus.table.policies.heartbeat",
    "silkbus.table.leases.change",
    "silkbus.table.leases.heartbeat",
    "silkbus.event.policies.policy.added",
    f"$JS.API.STREAM.INFO.{STREAM}",
    f"$JS.API.STREAM.CREATE.{STREAM}",
    f"$JS.API.STREAM.PURGE.{STREAM}",
    f"$JS.API.STREAM.MSG.GET.{STREAM}",
    f"$JS.API.DIRECT.GET.{STREAM}",
    f"$JS.API.CONSUMER.CREATE.{STREAM}.r1",
    f"$JS.API.CONSUMER.CREATE.{STREAM}.r1.silkbus.event.policies.>",
    f"$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.mine",
]
NOBODY_HEARS = [
    ">",
    "*",
    "*.>",
    "silkbus.>",
    "silkbus.*.*.*",
    "silkbus.table.>",
    "silkbus.table.*.*",
    "_INBOX.>",
    "_INBOX.*.*.>",
    "_INBOX.cell.>",
    "_INBOX.cell.*.>",
    "_INBOX.*.cell-2.>",
    "_INBOX.cell.cell-2.>",
    "_INBOX.cell.cell-2.x",
    "silkbus.lease.>",
    "silkbus.lease.cell-2.*",
    "silkbus.lease.cell-1.acquire",
    "silkbus.cell.cell-2.state",
    "silkbus.cell.*.explained",
    "silkbus.event.>",
    "_R_.>",
    "$JS.>",
    f"$JS.ACK.{STREAM}.>",
    "$SRV.>",
    "$SYS.>",
    "$SYS.ACCOUNT.>",
]
ONLY_THE_CENTRE_HEARS = ["silkbus.table.policies.fetch", "silkbus.table.leases.fetch", "$SRV.PING"]


async def test_a_stolen_cell_certificate_speaks_for_its_cell_alone(guarded: Guarded) -> None:
    others = ["silkbus.lease.cell-2.acquire", "silkbus.lease.cell-2.renew", "silkbus.lease.cell-2.release"]
    others += ["silkbus.cell.cell-2.state", "silkbus.cell.cell-2.explained", "silkbus.cell.cell-2.denied"]
    others += ["silkbus.cell.cell-2.container.created", "$JS.API.STREAM.CREATE.SILKBUS_CONTAINERS"]
    others += ["silkbus.ask.explain", "silkbus.lease.cell-1", "silkbus.lease.cell-1.acquire.more", "$SRV.PING"]
    async with thief(guarded, CELL, "cell-1") as cell:
        for subject in [*NOBODY_PUBLISHES, *ONLY_THE_CENTRE_PUBLISHES, *others]:
            assert not await cell.publishes(subject), subject
        for subject in ("silkbus.table.leases.fetch", "silkbus.lease.cell-1.acquire", "silkbus.cell.cell-1.state"):
            assert await cell.publishes(subject), subject
        for topic in ("explained", "denied", "container.created"):
            assert await cell.publishes(f"silkbus.cell.cell-1.{topic}")


async def test_a_stolen_cell_certificate_hears_tables_and_its_own_answers_alone(guarded: Guarded) -> None:
    async with thief(guarded, CELL, "cell-1") as cell:
        for subject in [*NOBODY_HEARS, *ONLY_THE_CENTRE_HEARS]:
            assert not await cell.listens(subject), subject
            assert not await cell.listens(subject, queue="publishers"), subject
        for subject in ("silkbus.table.policies.change", "silkbus.table.*.heartbeat", "_INBOX.cell.cell-1.>"):
            assert await cell.listens(subject), subject
        assert await cell.listens("silkbus.ask.explain")
        assert not await cell.listens("silkbus.cell.*.denied")


async def test_a_stolen_reader_certificate_reads_events_alone(guarded: Guarded) -> None:
    tables = ["silkbus.table.policies.change", "silkbus.table.*.heartbeat", "silkbus.event.policies.policy.added"]
    asks = ["silkbus.table.policies.fetch", "silkbus.lease.cell-1.acquire", "silkbus.cell.cell-1.state", "$SRV.PING"]
    async with thief(guarded, READER, "r1") as reader:
        for subject in [*NOBODY_PUBLISHES, *ONLY_THE_CENTRE_PUBLISHES, *asks]:
            assert not await reader.publishes(subject), subject
        for subject in [*NOBODY_HEARS, *ONLY_THE_CENTRE_HEARS, *tables, "_INBOX.reader.r2.>", "_INBOX.reader.>"]:
            assert not await reader.listens(subject), subject


@pytest.mark.parametrize("role", [POLICY_SERVER, SILK_CONTROLLER])
async def test_one_central_service_is_not_the_other(guarded: Guarded, role: str) -> None:
    table, stream = ("leases", "SILKBUS_LEASES") if role == POLICY_SERVER else ("policies", STREAM)
    async with thief(guarded, role) as server:
        refused = [f"silkbus.table.{table}.change", f"silkbus.event.{table}.a.b", f"$JS.API.STREAM.INFO.{stream}"]
        for subject in [*NOBODY_PUBLISHES, *refused, "silkbus.lease.cell-1.release"]:
            assert not await server.publishes(subject), subject
        assert not await server.listens(f"silkbus.table.{table}.fetch", queue="publishers")
        assert not await server.listens("silkbus.lease.cell-1.acquire")
        for subject in (">", "_INBOX.>", "_INBOX.cell.cell-1.>", "silkbus.>"):
            assert not await server.listens(subject), subject


async def test_an_answer_is_not_carried_where_the_asker_may_not_publish(guarded: Guarded, tmp_path: Path) -> None:
    """The policy server may publish events, and a cell says where it wants its answer."""
    forbidden = [
        "silkbus.event.policies.policy.added",
        "silkbus.table.policies.heartbeat",
        f"$JS.API.STREAM.PURGE.{STREAM}",
    ]
    async with (
        centre(
            guarded.url,
            f"sqlite:///{tmp_path}/notes.db",
            table=NOTES_AS_POLICIES,
            role=POLICY_SERVER,
            credentials=guarded.credentials(POLICY_SERVER),
        ),
        thief(guarded, CELL, "cell-1") as cell,
        thief(guarded, POLICY_SERVER) as server,
    ):
        jetstream = server.client.jetstream()
        await jetstream.add_stream(name=STREAM, subjects=["silkbus.event.policies.>"])
        heard = await cell.client.subscribe("silkbus.table.policies.heartbeat")
        question = encode({"epoch": None, "since": -1})
        # Asked properly it answers, so that the silence below means something.
        await eventually_answers(cell.client, question)
        for reply in forbidden:
            assert await cell.publishes("silkbus.table.policies.fetch", question, reply=reply)
        await eventually_answers(cell.client, question)
        assert (await jetstream.stream_info(STREAM)).state.messages == 0
        await asyncio.sleep(0.2)
        while heard.pending_msgs:
            assert b"snapshot" not in (await heard.next_msg()).data


async def eventually_answers(client: nats.aio.client.Client, question: bytes) -> None:
    for _ in range(100):
        try:
            await client.request("silkbus.table.policies.fetch", question, timeout=1)
        except nats.errors.Error:
            await asyncio.sleep(0.1)
        else:
            return
    pytest.fail("the policy server does not answer")


async def test_a_reader_reads_its_own_consumer_and_sends_events_nowhere_else(own: Guarded) -> None:
    """JetStream delivers wherever a request says: for a reader that must not be where tables are."""
    async with (
        thief(own, POLICY_SERVER) as relay,
        thief(own, READER, "r1") as reader,
        thief(own, CELL, "cell-1") as cell,
    ):
        jetstream = relay.client.jetstream()
        await jetstream.add_stream(StreamConfig(name=STREAM, subjects=["silkbus.event.policies.>"]))
        for name in ("r1", "r2"):
            consumer = ConsumerConfig(durable_name=name, ack_policy=AckPolicy.EXPLICIT)
            await jetstream.add_consumer(STREAM, consumer)
        for number in range(3):
            await jetstream.publish("silkbus.event.policies.policy.added", str(number).encode())

        heard = await cell.client.subscribe("silkbus.table.*.change")
        await barrier(cell.client)
        ask = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.r1"
        for place in (
            "silkbus.table.policies.change",
            "silkbus.event.policies.policy.added",
            "silkbus.lease.cell-2.release",
        ):
            assert await reader.publishes(ask, b'{"batch":1}', reply=place)
        await asyncio.sleep(0.5)
        assert heard.pending_msgs == 0
        assert (await jetstream.stream_info(STREAM)).state.messages == 3

        events = await reader.client.jetstream().pull_subscribe_bind(consumer="r1", stream=STREAM)
        await relay.client.jetstream().publish("silkbus.event.policies.policy.removed", b"3")
        (message,) = await events.fetch(1, timeout=10)
        assert message.subject.startswith("silkbus.event.policies.")
        await message.ack_sync(timeout=10)
        assert (await jetstream.consumer_info(STREAM, "r2")).num_pending == 4


async def test_everybody_can_do_their_own_work(guarded: Guarded, tmp_path: Path) -> None:
    async with (
        centre(
            guarded.url,
            f"sqlite:///{tmp_path}/notes.db",
            table=NOTES_AS_POLICIES,
            role=POLICY_SERVER,
            credentials=guarded.credentials(POLICY_SERVER),
        ) as here,
        follower(
            guarded.url, table=NOTES_AS_POLICIES, name="cell-1", credentials=guarded.credentials(CELL, "cell-1")
        ) as there,
        connect(
            guarded.url, role=SILK_CONTROLLER, name="one", credentials=guarded.credentials(SILK_CONTROLLER)
        ) as controller,
    ):
        await there.replica.usable()
        await here.write(a="1", large="x" * 3_000_000)
        await eventually(lambda: there.replica.revision == 1)
        await here.write(a="2")
        await eventually(lambda: there.replica.entries[("a",)] == "2")

        async def lease(subject: str, _: object) -> dict[str, str]:
            return {"asked": subject}

        await controller.serve(subjects.lease("*", "renew"), lease, queue=SILK_CONTROLLER)
        assert await controller.wait_connected(10)
        await flushed(controller)
        answer = await there.connection.request(subjects.lease("cell-1", "renew"), {}, timeout=10)
        assert answer.text("asked") == "silkbus.lease.cell-1.renew"


async def flushed(connection: Connection) -> None:
    assert connection._client is not None
    await barrier(connection._client)


async def test_what_is_not_permitted_is_logged_with_its_subject_and_ends_nothing(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(
        guarded.url, role=CELL, name="cell-1", credentials=guarded.credentials(CELL, "cell-1")
    ) as connection:
        assert await connection.wait_connected(10)
        client = connection._client
        await connection.listen("silkbus.lease.cell-2.renew", lambda *_: None)
        await connection.publish("silkbus.table.policies.change", {})
        await eventually(lambda: len(refusals(caplog)) == 2)
        for subject in ("silkbus.lease.cell-2.renew", "silkbus.table.policies.change"):
            assert any(subject in refusal for refusal in refusals(caplog))
        await asyncio.sleep(3)  # longer than a round of looking whether the server still answers
        assert connection._client is client
        assert connection.connected


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [logged(record) for record in caplog.records if "does not permit" in record.message]


def logged(record: logging.LogRecord) -> str:
    return str(getattr(record, "about", {}).get("error"))


async def test_a_new_cell_is_let_in_without_a_restart_and_one_taken_out_is_not(
    own: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    own.layout = own.layout.__class__(**{**fields_of(own), "cells": ("cell-1", "cell-3")})
    own.layout.write()
    async with (
        connect(own.url, role=CELL, name="cell-1", credentials=own.credentials(CELL, "cell-1")) as one,
        connect(own.url, role=CELL, name="cell-3", credentials=own.credentials(CELL, "cell-3")) as three,
    ):
        assert await one.wait_connected(10)
        client = one._client
        await eventually(lambda: "NATS has no user for the certificate" in caplog_text(caplog))
        assert not three.connected
        own.allow("cell-1", "cell-3")
        await eventually(lambda: three.connected)
        assert one._client is client
        own.allow("cell-3")
        await eventually(lambda: not one.connected)
        assert three.connected


def fields_of(guarded: Guarded) -> dict[str, object]:
    layout = guarded.layout
    return {"out": layout.out, "servers": layout.servers, "cells": layout.cells, "readers": layout.readers}


def caplog_text(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(logged(record) for record in caplog.records)


async def test_other_credentials_are_refused_and_the_log_says_why(
    guarded: Guarded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Guarded.make(tmp_path)
    ours, theirs = guarded.credentials(CELL, "cell-1"), other.credentials(CELL, "cell-1")
    cases: list[tuple[Credentials | None, str]] = [
        (None, "set nats_ca, nats_cert and nats_key"),
        (Credentials(ours.ca, theirs.cert, theirs.key), "NATS refuses the certificate"),
        (theirs, "the server's certificate is not of"),
        (Credentials(ours.ca, ours.cert, theirs.key), "not a certificate and its own key"),
        (Credentials(ours.ca, ours.cert, tmp_path / "none.key"), "none.key: cannot be read"),
    ]
    for credentials, words in cases:
        caplog.clear()
        async with connect(guarded.url, role=CELL, name="cell-1", credentials=credentials) as connection:
            await eventually(lambda: caplog_text(caplog).count("\n") >= 2)  # it keeps trying
            assert not connection.connected
            assert words in caplog_text(caplog)


async def test_a_cell_is_no_server(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """Its certificate is by the same authority, and yet is good for no server that a service would talk to."""
    stolen = guarded.credentials(CELL, "cell-1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(stolen.cert, stolen.key)

    for tls, words in (("true", "the server's certificate is not of"), ("false", "does not ask for TLS")):
        caplog.clear()
        async with (
            pretender(context, tls) as url,
            connect(url, role=CELL, name="cell-2", credentials=guarded.credentials(CELL, "cell-2")) as connection,
        ):
            await eventually(lambda words=words: words in caplog_text(caplog))
            assert not connection.connected


@asynccontextmanager
async def pretender(context: ssl.SSLContext, tls: str) -> AsyncIterator[str]:
    """Something that speaks as a NATS server does, with this certificate or, if `tls` is "false", openly."""

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = f'"server_id":"x","version":"2.11.0","max_payload":1048576,"tls_required":{tls}'
        writer.write(f"INFO {{{info}}}\r\n".encode())
        with suppress(OSError):
            if tls == "true":
                await writer.start_tls(context)
            while line := await reader.readline():
                if line.startswith(b"PING"):
                    writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1")
    async with server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_an_operator_asks_services_and_nothing_else(guarded: Guarded) -> None:
    async with thief(guarded, OPERATOR) as operator:
        for subject in [*NOBODY_PUBLISHES[:-2], *ONLY_THE_CENTRE_PUBLISHES, "silkbus.table.policies.fetch"]:
            assert not await operator.publishes(subject), subject
        for subject in [*NOBODY_HEARS, *ONLY_THE_CENTRE_HEARS]:
            assert not await operator.listens(subject), subject
        assert await operator.publishes("$SRV.PING")
        assert await operator.listens("silkbus.cell.*.denied")


async def test_a_cell_answers_under_its_own_name_alone(guarded: Guarded) -> None:
    """Whoever asks all cells knows by the subject who answered, and hears nothing that is not theirs."""
    async with (
        thief(guarded, POLICY_SERVER) as server,
        thief(guarded, SILK_CONTROLLER) as controller,
        thief(guarded, CELL, "cell-1") as cell,
    ):
        questions = await cell.client.subscribe("silkbus.ask.explain")
        answers = await server.client.subscribe("silkbus.cell.*.explained")
        await barrier(cell.client)
        await barrier(server.client)
        assert await server.publishes("silkbus.ask.explain", b"?")
        assert (await questions.next_msg(timeout=10)).data == b"?"
        assert await cell.publishes("silkbus.cell.cell-1.explained", b"!")
        assert (await answers.next_msg(timeout=10)).subject == "silkbus.cell.cell-1.explained"
        assert not await cell.publishes("silkbus.cell.cell-2.explained", b"!")
        assert not await controller.publishes("silkbus.ask.explain")
        assert not await controller.listens("silkbus.cell.*.explained")
        assert not await server.publishes("silkbus.cell.cell-1.explained")
