"""Network namespaces by name, as `ip netns` keeps them in /run/netns.

No thread of this process ever enters one: what must run inside is started through `ip netns exec`, which also gives it
a mount namespace with the right /sys, into which later namespaces' files still propagate.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

FOLDER = Path("/run/netns")
COMMAND_TIMEOUT = 30.0


class CommandFailed(Exception):
    """A command of the system ended with an error; the text has the command and what it said."""


def run(command: Sequence[str], *, input: str | None = None, timeout: float = COMMAND_TIMEOUT) -> str:  # noqa: A002
    """Run a command and give back its standard output. Raises CommandFailed."""
    try:
        done = subprocess.run(  # noqa: S603 (the lab's own commands, no shell)
            command, input=input, capture_output=True, text=True, timeout=timeout, check=False
        )
    except FileNotFoundError:
        raise CommandFailed(f"{command[0]}: no such program; install it") from None
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{' '.join(command)}: did not end within {timeout:g} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise CommandFailed(f"{' '.join(command)}: {said}")
    return done.stdout


def inside(namespace: str, command: Sequence[str]) -> list[str]:
    """The command that runs `command` inside `namespace`."""
    return ["ip", "netns", "exec", namespace, *command]


def path(namespace: str) -> Path:
    return FOLDER / namespace


def create(namespace: str) -> None:
    """A new namespace whose loopback is up."""
    run(["ip", "netns", "add", namespace])
    run(["ip", "-n", namespace, "link", "set", "lo", "up"])


def delete(namespace: str) -> None:
    """Remove a namespace's name; the kernel removes the rest once no process is inside. None is no error."""
    if path(namespace).exists():
        run(["ip", "netns", "delete", namespace])


def configure(namespace: str, lines: Iterable[str]) -> None:
    """Run `ip` commands, one a line, inside a namespace, stopping at the first that fails."""
    run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines) + "\n")


def names(prefix: str) -> list[str]:
    """The namespaces whose names begin with `prefix`."""
    try:
        return sorted(entry.name for entry in FOLDER.iterdir() if entry.name.startswith(prefix))
    except FileNotFoundError:
        return []


def processes(namespaces: Iterable[str]) -> dict[int, str]:
    """The processes inside these namespaces: pid -> namespace."""
    wanted = {}
    for name in namespaces:
        with contextlib.suppress(OSError):
            status = path(name).stat()
            wanted[status.st_dev, status.st_ino] = name
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                status = (entry / "ns/net").stat()
                name = wanted.get((status.st_dev, status.st_ino), "")
                if name:
                    found[int(entry.name)] = name
    return found


def end_processes(namespaces: Sequence[str], *, grace: float = 5.0) -> None:
    """End every process inside these namespaces: SIGTERM, and SIGKILL to those that remain after `grace` seconds."""
    number, deadline = signal.SIGTERM, time.monotonic() + grace
    asked: set[int] = set()
    while found := processes(namespaces):
        for pid, name in found.items():
            if pid not in asked or number == signal.SIGKILL:
                _signal(pid, name, number)
                asked.add(pid)
        time.sleep(0.02)
        if time.monotonic() > deadline:
            if number == signal.SIGKILL:
                raise CommandFailed(f"processes survive SIGKILL in namespaces: {found}")
            number, deadline = signal.SIGKILL, time.monotonic() + 10


def _signal(pid: int, namespace: str, number: signal.Signals) -> None:
    """Signal a process if it still is in the namespace: held by a descriptor, its number cannot go to another."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if holds(pid, namespace):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def holds(pid: int, namespace: str) -> bool:
    """Whether this process is in this namespace now."""
    try:
        return Path(f"/proc/{pid}/ns/net").samefile(path(namespace))
    except OSError:
        return False
