"""The bus as this cell sees it: how long it takes, and whether the centre is heard."""

import asyncio
import statistics
from collections.abc import Iterator
from contextlib import suppress

from bus import subjects
from bus.connection import BusAway, Connection, connect
from bus.tables import LEASES, POLICIES
from services.doctor.finding import Finding, fine, unknown, warning, wrong
from services.doctor.settings import DoctorSettings

CHECK = "bus"
CONNECT_SECONDS = 5.0
LISTEN_SECONDS = 3.5
"""Of the centre's heartbeats, one a second."""
PINGS = 20
PING_TIMEOUT = 3.0
SLOW = 0.05


def look(settings: DoctorSettings) -> Iterator[Finding]:
    if not settings.cell:
        yield unknown(CHECK, "not looked at: this cell's name is not known", "set cell, or SILKBUS_CELL")
        return
    yield from asyncio.run(_look(settings))


async def _look(settings: DoctorSettings) -> list[Finding]:
    async with connect(
        settings.nats, role="cell", name=settings.cell, credentials=settings.nats_credentials
    ) as connection:
        if not await connection.wait_connected(CONNECT_SECONDS):
            remedy = "see that NATS runs there, that no firewall is between, and that the certificates are right"
            return [wrong(CHECK, f"no connection to NATS at {settings.nats} within {CONNECT_SECONDS:g} s", remedy)]
        heard = {POLICIES.name: 0, LEASES.name: 0}
        all_heard = asyncio.Event()
        for table in heard:

            def count(_subject: str, _data: bytes, table: str = table) -> None:
                heard[table] += 1
                if all(heard.values()):
                    all_heard.set()

            await connection.listen(subjects.table_heartbeat(table), count)
        found = await _latency(connection)
        with suppress(TimeoutError):
            async with asyncio.timeout(LISTEN_SECONDS):
                await all_heard.wait()
        return [*found, *judge_heard(heard)]


async def _latency(connection: Connection) -> list[Finding]:
    times = []
    try:
        for _ in range(PINGS):
            times.append(await connection.round_trip(PING_TIMEOUT))
            await asyncio.sleep(0.02)
    except BusAway as error:
        return [wrong(CHECK, f"NATS answers no more after {len(times)} pings: {error}", "see the log of nats-server")]
    return judge_latency(times)


def judge_latency(seconds: list[float]) -> list[Finding]:
    """What is to be said of these round trips."""
    middle, most = statistics.median(seconds) * 1000, max(seconds) * 1000
    text = f"a round trip takes {middle:.1f} ms, at most {most:.1f} ms of {len(seconds)}"
    if middle > SLOW * 1000:
        return [warning(CHECK, text, "have a NATS server nearer to the cells; look at the load of this machine")]
    return [fine(CHECK, text)]


def judge_heard(heard: dict[str, int]) -> list[Finding]:
    """What is to be said of so many heartbeats by table."""
    who = {POLICIES.name: "policy server", LEASES.name: "Silk controller"}
    silent = [table for table, number in heard.items() if not number]
    found = [
        wrong(
            CHECK,
            f"no {who[table]} is heard: {table} are as they were last known, and nothing changes",
            f"see that a {who[table]} runs, is connected to the same NATS, and that its database answers",
        )
        for table in silent
    ]
    said = ", ".join(who[table] for table in heard if table not in silent)
    return [*found, *([fine(CHECK, f"heard: {said}")] if said else [])]
