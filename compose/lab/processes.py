"""The lab's processes: started into a namespace, known by pid and start time, ended for certain.

A pid alone may have gone to another process since it was written down; with its start time (proc_pid_stat(5), field
22) it cannot. A process outlives the command that started it: each is its own session with its output in a log file.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.lab.namespaces import inside

STOP_TIMEOUT = 10.0
POLL = 0.02


class NotReady(Exception):
    """A process ended, or did not become ready in time; the text says which, and ends with the end of its log."""


@dataclass(frozen=True, slots=True)
class Process:
    name: str
    pid: int
    started: int
    log: Path

    def alive(self) -> bool:
        child = _children.get(self.pid)
        if child is not None:
            child.poll()
        return _start_time(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Send a signal, if it still is that process."""
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.alive():
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def stop(self, *, timeout: float = STOP_TIMEOUT) -> None:
        """SIGTERM, and SIGKILL if it has not ended after `timeout` seconds."""
        self.signal(signal.SIGTERM)
        if not self._ended(timeout):
            self.kill()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if not self._ended(STOP_TIMEOUT):
            raise NotReady(f"{self.name} (pid {self.pid}) survives SIGKILL")

    def _ended(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def encode(self) -> dict[str, Any]:
        return {"name": self.name, "pid": self.pid, "started": self.started, "log": str(self.log)}

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> "Process":
        return cls(value["name"], value["pid"], value["started"], Path(value["log"]))


_children: dict[int, "subprocess.Popen[bytes]"] = {}
"""Processes that this one started: they must be polled, or they stay as zombies."""


def start(
    name: str,
    command: Sequence[str],
    *,
    namespace: str,
    log: Path,
    environment: Mapping[str, str],
    descriptors: Sequence[int] = (),
) -> Process:
    """Start `command` in a namespace, its output appended to `log`, with these open descriptors kept.

    It gets a plain environment and these variables only, so that nothing of the caller's shell changes a service.
    """
    variables = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **environment}
    with log.open("ab") as output:
        child = subprocess.Popen(  # noqa: S603 (the lab's own commands, no shell)
            inside(namespace, command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=variables,
            pass_fds=tuple(descriptors),
            start_new_session=True,
        )
    _children[child.pid] = child
    # The start time is that of the fork: exec, by Popen and then by `ip netns exec`, does not change it.
    return Process(name, child.pid, _start_time(child.pid) or 0, log)


def wait_ready(process: Process, ready: Callable[[], str | None], *, timeout: float = 30.0) -> None:
    """Wait until `ready()` gives None instead of what is missing. Raises NotReady."""
    deadline = time.monotonic() + timeout
    while (missing := ready()) is not None:
        if not process.alive():
            raise NotReady(f"{process.name} ended while starting; its log ({process.log}) ends:\n{_tail(process.log)}")
        if time.monotonic() > deadline:
            raise NotReady(
                f"{process.name} is not ready after {timeout:g} s: {missing.strip()}; "
                f"its log ({process.log}) ends:\n{_tail(process.log)}"
            )
        time.sleep(POLL)


def _start_time(pid: int) -> int | None:
    """The start time of a running process in clock ticks since boot; None for none, or one that has ended."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command, in parentheses, may itself hold blanks and parentheses: the rest begins after the last one.
    rest = content.rpartition(")")[2].split()
    return None if rest[0] in "ZX" else int(rest[19])


def _tail(log: Path, lines: int = 12) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return "(no log)"
