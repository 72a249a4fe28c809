"""The three services of this cell, as they say of themselves on their sockets."""

import asyncio
import stat
from collections.abc import Iterator

import httpx

from bus.local import Refused, Service, Unreachable
from services.doctor.finding import Finding, fine, warning, wrong
from services.doctor.settings import DoctorSettings

CHECK = "services"
PROGRAMS = {"silk": "silkbus-silk-worker", "enforcer": "silkbus-enforcer", "networker": "silkbus-networker"}
TIMEOUT = 5.0


def look(settings: DoctorSettings) -> Iterator[Finding]:
    yield from asyncio.run(_look(settings))


async def _look(settings: DoctorSettings) -> list[Finding]:
    found: list[Finding] = []
    for name in PROGRAMS:
        found += await _look_at(name, settings)
    return found


async def _look_at(name: str, settings: DoctorSettings) -> list[Finding]:
    program, path = PROGRAMS[name], settings.socket(name)
    restart = f"start {program}, and see its log"
    if not path.exists():
        return [wrong(CHECK, f"{name}: no socket {path}", f"{restart}; or correct run_dir, here {settings.run_dir}")]
    found = []
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        found.append(wrong(CHECK, f"{name}: others than its owner may use {path}", f"chmod 600 {path}"))
    try:
        ready, text = await _ready(name, settings)
    except (httpx.HTTPError, TimeoutError) as error:
        return [*found, wrong(CHECK, f"{name}: does not answer at {path}: {error!r}", restart)]
    if not ready:
        return [*found, wrong(CHECK, f"{name}: not ready: {text}", f"see the log of {program}")]
    if name == "enforcer" and (problem := await _table(settings)) is not None:
        found.append(problem)
    return found or [fine(CHECK, f"{name}: ready")]


async def _ready(name: str, settings: DoctorSettings) -> tuple[bool, str]:
    """What /readyz says, and only what is missing of it."""
    transport = httpx.AsyncHTTPTransport(uds=str(settings.socket(name)))
    async with (
        httpx.AsyncClient(transport=transport, base_url=f"http://{name}", trust_env=False) as client,
        asyncio.timeout(TIMEOUT),
    ):
        answer = await client.get("/readyz", timeout=None)
    missing = [line for line in answer.text.splitlines() if not line.endswith("ok")]
    return answer.status_code == httpx.codes.OK, "; ".join(missing)


async def _table(settings: DoctorSettings) -> Finding | None:
    """What is wrong with the enforcer's copy of the policies."""
    service = Service("enforcer", settings.socket("enforcer"))
    try:
        state = await service.call("GET", "/state", timeout=TIMEOUT)
    except (Unreachable, Refused) as error:
        return wrong(CHECK, f"enforcer: {error}", "restart silkbus-enforcer, and see its log")
    finally:
        await service.close()
    if problem := state.get("problem"):
        return wrong(
            CHECK, f"enforcer: the kernel is not as it should be: {problem}", "see the log of silkbus-enforcer"
        )
    if (table := state.get("table")) != "live":
        return warning(
            CHECK,
            f"enforcer: its policies are {table}: as of revision {state.get('revision')}, and no change reaches it",
            "see that the bus and a policy server can be reached (below)",
        )
    return None
