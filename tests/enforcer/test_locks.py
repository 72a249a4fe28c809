"""Others at the same tables and at the same lock, programs that are slow or die: waited for within bounds, and said."""

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.enforcer import iptables
from services.enforcer.reconciler import NotReady
from services.enforcer.xtables_lock import Locked, xtables_lock
from tests.enforcer.conftest import enforcing, tags, tcp
from tests.enforcer.world import Cell, until

KNOWN = tags(web=1, api=0x1234, db=3)
HOLD = (
    "import fcntl, os, sys, time\n"
    "lock = os.open(os.environ['XTABLES_LOCKFILE'], os.O_RDONLY | os.O_CREAT)\n"
    "while True:\n"
    "    fcntl.flock(lock, fcntl.LOCK_EX); time.sleep(float(sys.argv[1])); fcntl.flock(lock, fcntl.LOCK_UN)\n"
    "    time.sleep(float(sys.argv[2]))\n"
)


@contextmanager
def running(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait(30)


def test_the_lock_is_the_file_that_iptables_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    with xtables_lock(0), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(Locked, match="not free within"), xtables_lock(0.1):
            pass
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "nowhere" / "lock"))
    with pytest.raises(Locked, match="No such file"), xtables_lock(0):
        pass


@pytest.mark.kernel
async def test_who_takes_the_lock_again_and_again_is_survived(cell: Cell) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    async with enforcing(cell, "legacy", known=KNOWN) as enforcer:
        with running(sys.executable, "-c", HOLD, "0.3", "0.01"):
            for _ in range(3):
                await enforcer.allow("web", "api", tcp(8080))
                assert web.reaches(api, 8080)
                await enforcer.allow("web", "api")
                assert not web.reaches(api, 8080)
        assert enforcer.reconciler.problem is None


@pytest.mark.kernel
async def test_who_never_gives_the_lock_back_is_named(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    monkeypatch.setattr(iptables, "LOCK_WAIT", 1)
    async with enforcing(cell, "legacy", known=KNOWN) as enforcer:
        with running(sys.executable, "-c", HOLD, "1000", "0"):
            await until(lambda: locked(Path(os.environ["XTABLES_LOCKFILE"])))
            with pytest.raises(NotReady, match=r"(?i)xtables lock"):
                await enforcer.allow("web", "api", tcp(8080))
            assert "lock" in (enforcer.reconciler.problem or "").lower()
            assert not web.reaches(api, 8080)
        await until(lambda: enforcer.reconciler.problem is None)
        assert web.reaches(api, 8080)


def locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.kernel
async def test_others_who_change_rules_all_the_time_are_survived(cell: Cell, kind: str) -> None:
    web, api = cell.box("web"), cell.box("api")
    api.serve(8080)
    loop = (
        f"while true; do ip netns exec {cell.name} iptables-{kind} -w -I FORWARD 1 -s 1.2.3.4 -j ACCEPT;"
        f" ip netns exec {cell.name} iptables-{kind} -w -D FORWARD -s 1.2.3.4 -j ACCEPT; done"
    )
    async with enforcing(cell, kind, known=KNOWN) as enforcer:
        with running("bash", "-c", loop):
            ends = time.monotonic() + 4
            while time.monotonic() < ends:
                await enforcer.allow("web", "api", tcp(8080))
                assert web.reaches(api, 8080)
                await enforcer.allow("web", "api")
                assert not web.reaches(api, 8080)
        await until(lambda: enforcer.reconciler.problem is None)


@pytest.mark.kernel
async def test_a_slow_program_holds_up_changes_and_nothing_else(
    cell: Cell, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web, db, api = cell.box("web"), cell.box("db"), cell.box("api")
    api.serve(8080)
    api.serve(9090)
    slow = tmp_path / f"iptables-{kind}-restore"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {shutil.which(slow.name)} "$@"\n')
    slow.chmod(0o755)
    known = {**KNOWN, ("policy", "api", "web"): (tcp(9090),)}
    async with enforcing(cell, kind, known=known) as enforcer:
        with monkeypatch.context() as patched:
            patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            # Nine rules: more than is done without the program.
            change = asyncio.create_task(enforcer.allow("web", "api", *(tcp(port) for port in range(8080, 8089))))
            began, looks = time.monotonic(), 0
            while not change.done():
                await asyncio.sleep(0.01)
                looks += 1
                if looks == 50:
                    assert not await asyncio.to_thread(db.reaches, api, 8080), "what no policy allows stays out"
                    assert await asyncio.to_thread(web.reaches, api, 9090), "what was allowed goes on"
            await change
            assert time.monotonic() - began >= 3
            assert looks > 100, "the event loop answered all the while"
            assert web.reaches(api, 8080)
            # One that never ends is ended, and said.
            patched.setattr(iptables, "TIMEOUT", 0.5)
            with pytest.raises(NotReady, match="no answer within"):
                await enforcer.allow("db", "api", *(tcp(port) for port in range(8080, 8089)))
            assert not db.reaches(api, 8080)
        await until(lambda: enforcer.reconciler.problem is None)
        assert db.reaches(api, 8080)
