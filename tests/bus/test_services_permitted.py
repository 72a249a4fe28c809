"""The real policy server and Silk controller, under the permissions that `silkbus nats-config` wrote.

Everything that they are there for works with a cell's, a reader's and an operator's certificate, and nothing that they
try is refused.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import nats.errors

from bus import subjects
from bus.connection import BusAway, Connection, NoAnswer, connect
from bus.credentials import Credentials
from bus.decode import Fields
from bus.explaining import CellAnswer, Question
from bus.messages import CellName, Revision
from bus.permissions import CELL, OPERATOR, POLICY_SERVER, READER, SILK_CONTROLLER
from bus.tables import LEASES, POLICIES, Replica
from bus.wire import decode
from tests.bus.guarded import Guarded, Thief, thief
from tests.bus.tables import cancel, eventually
from tests.nats_server import free_port

TOKEN = "an-admin's-token"  # noqa: S105
WAIT = 60.0


def settings(guarded: Guarded, credentials: Credentials, database: Path) -> dict[str, str]:
    return {
        "SILKBUS_NATS": guarded.url,
        "SILKBUS_NATS_CA": str(credentials.ca),
        "SILKBUS_NATS_CERT": str(credentials.cert),
        "SILKBUS_NATS_KEY": str(credentials.key),
        "SILKBUS_DATABASE": f"sqlite:///{database}",
        "SILKBUS_EVENT_READERS": "r1,r2",
    }


@contextmanager
def running(program: str, log: Path, environment: dict[str, str]) -> Iterator[None]:
    with log.open("wb") as stream:
        command = Path(sys.executable).with_name(program)
        process = subprocess.Popen([command], env={**os.environ, **environment}, stderr=stream)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def ask(connection: Connection, subject: str, message: dict[str, object]) -> Fields:
    """The answer, as soon as somebody is up to give it."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            return await connection.request(subject, message, timeout=2)
        except (BusAway, NoAnswer):
            assert time.monotonic() < deadline, f"nobody answers {subject}"
            await asyncio.sleep(0.1)


async def add_policy(url: str) -> None:
    policy = {"source": {"id": "a"}, "destination": {"id": "b", "protocol": "tcp", "ports": {"start": 80, "end": 80}}}
    deadline = time.monotonic() + WAIT
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"bearer {TOKEN}"}, trust_env=False) as api:
        while True:
            try:
                answer = await api.post("/networking/v1/external/policies", json={"policies": [policy]})
            except httpx.HTTPError:
                assert time.monotonic() < deadline, "the policy server does not come up"
                await asyncio.sleep(0.1)
            else:
                assert answer.status_code == 200, answer.text
                return


def answering(cell: Connection) -> Callable[[str, bytes], None]:
    """What answers questions about flows for cell-1, which has no containers."""
    tasks = set()

    def hear(subject: str, data: bytes) -> None:
        question = Question.decode(decode(data, subject))
        answer = CellAnswer(question.id, CellName("cell-1"), Revision(0))
        tasks.add(asyncio.create_task(cell.publish(subjects.cell("cell-1", "explained"), answer.encode())))

    return hear


async def explained(url: str) -> dict[str, object]:
    """How many cells were asked about a flow, and answered; once the server knows of the lease."""
    params = {"source": "a", "destination": "b", "protocol": "tcp", "port": "80"}
    deadline = time.monotonic() + WAIT
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"bearer {TOKEN}"}, trust_env=False) as api:
        while True:
            answer = await api.get("/networking/v1/external/explain", params=params, timeout=30)
            cells = answer.raise_for_status().json()["cells"]
            if cells is not None and cells["answered"]:
                return {**cells, "silent": cells["silent"]["count"]}
            assert time.monotonic() < deadline, f"no cell answers: {cells}"
            await asyncio.sleep(0.1)


async def first_event(reader: Thief, stream: str, name: str) -> str:
    """The subject of the first event that a reader gets."""
    events = await reader.client.jetstream().pull_subscribe_bind(consumer=name, stream=stream)
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        with suppress(nats.errors.Error):
            for message in await events.fetch(1, timeout=2):
                await message.ack_sync(timeout=5)
                return message.subject
        await asyncio.sleep(0.1)
    raise TimeoutError(stream)


async def test_the_services_work_and_try_nothing_that_is_not_permitted(tmp_path: Path) -> None:
    guarded = Guarded.make(tmp_path)
    port = free_port()
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps({"tokens": [{"token": TOKEN, "user": "admin", "scopes": ["network.admin"]}]}))
    policy_log, silk_log = tmp_path / "policy.log", tmp_path / "silk.log"
    with ExitStack() as stack:
        guarded.start()
        stack.callback(guarded.stop)
        policy = settings(guarded, guarded.credentials(POLICY_SERVER), tmp_path / "policy.db")
        policy |= {"SILKBUS_LISTEN": f"127.0.0.1:{port}", "SILKBUS_TOKENS": str(tokens)}
        stack.enter_context(running("silkbus-policy-server", policy_log, policy))
        silk = settings(guarded, guarded.credentials(SILK_CONTROLLER), tmp_path / "silk.db")
        silk |= {"SILKBUS_RUN_DIR": str(tmp_path / "run")}
        stack.enter_context(running("silkbus-silk-controller", silk_log, silk))

        async with connect(
            guarded.url, role=CELL, name="cell-1", credentials=guarded.credentials(CELL, "cell-1")
        ) as cell:
            policies, leases = Replica(cell, POLICIES), Replica(cell, LEASES)
            tasks = [asyncio.create_task(replica.run()) for replica in (policies, leases)]
            answer = await ask(cell, subjects.lease("cell-1", "acquire"), {"underlay": "10.0.0.5"})
            assert answer.mapping("lease")["cell"] == "cell-1", answer
            await add_policy(f"http://127.0.0.1:{port}")
            await eventually(lambda: len(leases.entries) == 1 and len(policies.entries) == 3, WAIT)
            await cell.listen(subjects.EXPLAIN, answering(cell))
            assert await explained(f"http://127.0.0.1:{port}") == {
                "asked": 1,
                "answered": 1,
                "silent": 0,
                "problems": [],
            }
            async with thief(guarded, READER, "r1") as reader:
                assert await first_event(reader, "SILKBUS_LEASES", "r1") == "silkbus.event.leases.lease.acquired"
                assert await first_event(reader, "SILKBUS_POLICIES", "r1") == "silkbus.event.policies.policy.added"
            async with thief(guarded, OPERATOR) as operator:
                inbox = await operator.client.subscribe(operator.client.new_inbox())
                await operator.client.publish("$SRV.STATS", reply=inbox.subject)
                found = [json.loads((await inbox.next_msg(timeout=10)).data) for _ in range(2)]
                assert {service["name"] for service in found} == {POLICY_SERVER, SILK_CONTROLLER}
            for task in tasks:
                await cancel(task)
    for log in (policy_log, silk_log):
        assert "does not permit" not in log.read_text()
