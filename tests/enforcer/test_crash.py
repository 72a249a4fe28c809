"""Killed at each place where it matters, and started again: the kernel ends as it should, and never opens between."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bus.local import Refused, Service
from bus.records import Records
from tests.enforcer.world import Cell, echoes, is_cut, until

pytestmark = pytest.mark.kernel
Change = list[tuple[list[str], object]]
TAGS: Change = [(["tag", "web"], 1), (["tag", "db"], 3), (["tag", "api"], 2)]
WEB: Change = [(["policy", "api", "web"], [["tcp", 8080, 8080]])]
DB: Change = [(["policy", "api", "db"], [["tcp", 8080, 8080]])]
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
def test_killed_in_the_middle_of_a_change(cell: Cell, kind: str, failpoint: str) -> None:
    web, db, api = cell.box("web"), cell.box("db"), cell.box("api")
    api.serve(8080)
    cell.exec(f"iptables-{kind} -w -A FORWARD -s 1.2.3.4 -j DROP")
    child = Child(cell, kind, failpoint)
    assert child.tell(TAGS + WEB)
    stream = web.tcp(api, 8080)
    assert echoes(stream)
    # One revision takes a policy away and adds another.
    assert not child.tell(NO_WEB + DB)
    assert child.ended() == -signal.SIGKILL
    before = failpoint.startswith("enforcer.before")
    assert web.reaches(api, 8080) is before
    assert db.reaches(api, 8080) is not before
    after = Child(cell, kind)
    assert after.tell(TAGS + DB)
    assert is_cut(stream)
    assert not web.reaches(api, 8080)
    assert db.reaches(api, 8080)
    assert "-A FORWARD -s 1.2.3.4/32 -j DROP" in cell.saved(kind)
    after.kill()
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
