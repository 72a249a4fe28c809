"""Probes from inside containers: who can really open a connection to whom, and exactly when that changes.

Each probe is a process inside the container's namespace (`container_process.py`), so packets take the same way as
those of an app there. What is seen is what the container sees.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from compose.lab.container_process import ACCEPTED
from compose.lab.namespaces import CommandFailed, inside, run

PROGRAM = Path(__file__).with_name("container_process.py")
START_TIMEOUT = 20.0

# A refusal arrives at once; what has not come within this is lost. Loaded machines are slow, so it is generous.
CONNECT_TIMEOUT = 3.0
# Shorter than the first retransmission of a SYN (1 s), so that a lost one is seen as what it is.
WATCH_TIMEOUT = 0.9
# One attempt each millisecond stays below two milliseconds apart even when the probe is a little late.
WATCH_INTERVAL = 0.001


@dataclass(frozen=True, slots=True)
class Outcome:
    """`verdict` is "accepted", "refused" or "timed out"; `by` is the greeting of who accepted."""

    verdict: str
    by: str = ""
    error: str = ""

    @property
    def accepted(self) -> bool:
        return self.verdict == ACCEPTED


def target(address: str, port: int, protocol: str = "tcp") -> str:
    return f"{protocol}:{address}:{port}"


def program(*arguments: str) -> list[str]:
    """The command line of what runs inside a container; isolated, so that it starts fast and reads no one's files."""
    return [sys.executable, "-IS", str(PROGRAM), *arguments]


def connect(namespace: str, targets: Sequence[str], *, timeout: float = CONNECT_TIMEOUT) -> list[Outcome]:
    """Try these targets, all at once, from inside a namespace; one outcome each, in order."""
    if not targets:
        return []
    text = run(inside(namespace, program("connect", str(timeout), *targets)), timeout=timeout + START_TIMEOUT)
    return [Outcome(item["outcome"], item.get("by", ""), item.get("error", "")) for item in json.loads(text)]


@dataclass(frozen=True, slots=True)
class Transition:
    """A target's verdict became another at an attempt begun and ended at these times (CLOCK_MONOTONIC, seconds).

    `gap` is the time, in seconds, since the attempt before it was begun.
    """

    target: int
    verdict: str
    begun: float
    ended: float
    gap: float

    @property
    def accepted(self) -> bool:
        return self.verdict == ACCEPTED


@dataclass(frozen=True, slots=True)
class Seen:
    """What a watch saw: all transitions, and per target the number of each verdict."""

    transitions: list[Transition]
    counts: list[dict[str, int]]

    def of(self, number: int) -> list[Transition]:
        """The transitions of one target; the first is its first verdict."""
        return [transition for transition in self.transitions if transition.target == number]

    def only(self, verdict: str, number: int = 0) -> bool:
        """Whether every attempt at a target ended so."""
        return set(self.counts[number]) == {verdict}


class Watch:
    """Tries targets from inside a namespace again and again, while inside `with`; then `seen` tells.

    On entering it waits until each target has had its first verdict.
    """

    def __init__(
        self,
        namespace: str,
        targets: Sequence[str],
        *,
        interval: float = WATCH_INTERVAL,
        timeout: float = WATCH_TIMEOUT,
    ) -> None:
        self._command = inside(namespace, program("watch", str(interval), str(timeout), *targets))
        self._timeout = timeout
        self._seen: Seen | None = None
        self._transitions: list[Transition] = []
        self._summary: dict[str, Any] | None = None
        self._ready = False
        self._ended = False
        self._news = threading.Condition()

    @property
    def seen(self) -> Seen:
        if self._seen is None:
            raise RuntimeError("a watch tells what it saw only after it has ended")
        return self._seen

    def wait_for(self, number: int, *, accepted: bool, after: float, timeout: float = 10.0) -> Transition | None:
        """The first change of a target to (or away from) accepted, answered after this time; None if none comes."""

        def found() -> Transition | None:
            return next(
                (
                    transition
                    for transition in self._transitions
                    if (transition.target, transition.accepted) == (number, accepted) and transition.ended >= after
                ),
                None,
            )

        with self._news:
            self._news.wait_for(lambda: found() is not None or self._ended, timeout)
            return found()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 (for the type checker: it was asked for)
        for line in self._process.stdout:
            values = json.loads(line)
            with self._news:
                if "ready" in values:
                    self._ready = True
                elif "target" in values:
                    self._transitions.append(
                        Transition(values["target"], values["outcome"], values["begun"], values["ended"], values["gap"])
                    )
                else:
                    self._summary = values
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def __enter__(self) -> "Watch":
        self._process = subprocess.Popen(  # noqa: S603 (the lab's own commands, no shell)
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the lab, which ends its probes itself
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with self._news:
            self._news.wait_for(lambda: self._ready or self._ended, START_TIMEOUT + self._timeout)
        if not self._ready:
            self._close()
            raise CommandFailed(f"{' '.join(self._command)}: was not ready within {START_TIMEOUT + self._timeout:g} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._process.stdin is not None  # noqa: S101
            self._process.stdin.close()  # which asks it to stop
            self._reader.join(self._timeout + START_TIMEOUT)
        self._close()
        if kind is not None:
            return
        if self._summary is None:
            raise CommandFailed(f"{' '.join(self._command)}: ended without telling what it saw")
        self._seen = Seen(self._transitions, self._summary["counts"])

    def _close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(START_TIMEOUT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
