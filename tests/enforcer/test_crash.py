"""Killed at each place where it matters, and started again: the kernel ends as it should, and never opens between."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from bus.local import Refused, Service
from bus.records import Records
from tests.enforcer.pushing import flows, runs
from tests.enforcer.world import Box, Cell, echoes, is_cut, until

pytestmark = pytest.mark.kernel
Change = list[tuple[list[str], object]]
TAGS: Change = [(["tag", "web"], 1), (["tag", "db"], 3), (["tag", "api"], 2)]
WEB: Change = [(["policy", "api", "web"], [["tcp", 8080, 8080], ["tcp", 8100, 8102], ["udp", 8100, 8102]])]
KEPT: Change = [(["policy", "api", "db"], [["tcp", 9090, 9092], ["udp", 9090, 9092]])]
KEPT_AND_DB: Change = [(["policy", "api", "db"], [["tcp", 8080, 8080], ["tcp", 9090, 9092], ["udp", 9090, 9092]])]
NO_WEB: Change = [(["policy", "api", "web"], None)]


class Child:
    def __init__(self, cell: Cell, kind: str, failpoints: str = "") -> None:
        boxes = [f"{box.name}={box.address}={box.container.app}" for box in cell.boxes]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.enforcer.child", cell.name, kind, *boxes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SILKBUS_FAILPOINTS": failpoints},
            cwd=Path(__file__).parents[2],
        )

    def tell(self, change: Change) -> bool:
        """Whether it lived to say that the kernel has it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(change) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline() == "done\n"

    def ended(self) -> int:
        return self._process.wait(30)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)


# The fence and the first apply pass the first two as well: the third passing is the change, the second for the last.
@pytest.mark.parametrize(
    "failpoint", ["enforcer.before-apply=kill:3", "enforcer.after-apply=kill:3", "enforcer.after-cut=kill:2"]
)
async def test_killed_in_the_middle_of_a_change(cell: Cell, kind: str, failpoint: str) -> None:
    web, db, api = cell.box("web"), cell.box("db"), cell.box("api")
    api.serve(8080)
    # Else the refusals of datagrams use up those of connections, and each probe waits for its time limit.
    cell.sysctl(net__ipv4__icmp_ratelimit=0)
    with ExitStack() as stack:
        await killed(cell, kind, failpoint, web, db, api, stack)


async def killed(cell: Cell, kind: str, failpoint: str, web: Box, db: Box, api: Box, stack: ExitStack) -> None:
    cell.exec(f"iptables-{kind} -w -A FORWARD -s 1.2.3.4 -j DROP")
    child = Child(cell, kind, failpoint)
    assert child.tell(TAGS + WEB + KEPT)
    stream = web.tcp(api, 8080)
    assert echoes(stream)
    cut, kept = stack.enter_context(flows(web, api, 8100)), stack.enter_context(flows(db, api, 9090))
    for flow in (*cut, *kept):
        assert await runs(flow), flow.name
    # One revision takes a policy away and adds another.
    assert not child.tell(NO_WEB + KEPT_AND_DB)
    assert child.ended() == -signal.SIGKILL
    before = failpoint.startswith("enforcer.before")
    assert web.reaches(api, 8080) is before
    assert db.reaches(api, 8080) is not before
    for flow in kept:
        assert await runs(flow), f"{flow.name}: broken by the crash"
    after = Child(cell, kind)
    assert after.tell(TAGS + KEPT_AND_DB)
    assert is_cut(stream)
    await asyncio.sleep(1)
    arrived = [flow.arrived for flow in cut]
    await asyncio.sleep(1)
    assert [flow.arrived for flow in cut] == arrived
    for flow in kept:
        assert await runs(flow), f"{flow.name}: broken by the start"
    assert not web.reaches(api, 8080)
    assert db.reaches(api, 8080)
    assert "-A FORWARD -s 1.2.3.4/32 -j DROP" in cell.saved(kind)
    after.kill()
    for flow in kept:
        assert await runs(flow), flow.name
    # Dead, it still enforces.
    assert not web.reaches(api, 8080)
    assert db.reaches(api, 8080)


async def test_the_agent_without_a_centre_denies_and_admits(cell: Cell, tmp_path: Path) -> None:
    """The whole process, cold: no bus, no cache. Ten seconds until it gives up waiting for them."""
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    records = Records(tmp_path / "state" / "containers")
    records.put(web.container)
    environment = {
        "SILKBUS_CELL": "cold",
        "SILKBUS_RUN_DIR": str(tmp_path / "run"),
        "SILKBUS_STATE_DIR": str(tmp_path / "state"),
    }
    process = subprocess.Popen(
        ["ip", "netns", "exec", cell.name, sys.executable, "-c", "from services.enforcer.agent import main; main()"],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )
    try:
        path = tmp_path / "run" / "enforcer" / "enforcer.sock"
        await until(path.exists)
        assert not web.reaches(api, 8080)
        assert path.stat().st_mode & 0o777 == 0o600
        enforcer = Service("enforcer", path)
        with pytest.raises(Refused, match="address: missing"):
            await enforcer.call("POST", "/admit", {"container": {**api.container.encode(), "address": None}})
        answer = await enforcer.call("POST", "/admit", {"container": api.container.encode()}, timeout=20)
        state = await enforcer.call("GET", "/state")
        assert state["instance"] == answer["instance"]
        assert (state["containers"], state["table"], state["problem"]) == (2, "degraded", None)
        assert not web.reaches(api, 8080)
        assert await enforcer.call("POST", "/sync") == {"instance": answer["instance"], "revision": 0}
        assert await enforcer.call("POST", "/forget", {"handle": web.container.handle})
        await enforcer.close()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(20)
