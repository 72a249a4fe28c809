"""The life of a lab: made, opened again by a later command, destroyed; and what is left when a command was killed.

A command holds the lab's lock for as long as it works with it. So a lab that nobody holds is either kept on purpose
(`lab up`) or a leftover, and a leftover is removed by whoever finds it: its processes are those inside its namespaces,
and its namespaces are those with its prefix.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from compose.lab import namespaces
from compose.lab.lab import Lab, Report
from compose.lab.state import LabError, Layout, State, forget, known, locked

MAX_CELLS = 100
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def requirements() -> None:
    """Raise LabError, naming all of it, if this machine or user cannot have a lab."""
    if os.geteuid() != 0:
        raise LabError("a lab needs root (for network namespaces): run it with sudo")
    # Who became root by `su` may have a PATH without these.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS])
    needed = ("ip", "iptables-restore", "iptables-save", "ipset", "sysctl")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        raise LabError(
            f"a lab needs programs that are missing: {', '.join(missing)}; on Debian and Ubuntu: "
            "apt-get install iproute2 iptables ipset procps"
        )


def destroy(layout: Layout) -> None:
    """End and remove everything of a lab, whatever state it is in; nothing there is no error."""
    everything = namespaces.names(layout.prefix)
    namespaces.end_processes(everything, grace=0)
    state = State.load(layout)
    if state is not None:
        # They have ended, for they were inside; those that were our children are collected.
        for process in [*state.services.values(), *(app.process for app in state.apps.values())]:
            process.kill()
    for name in everything:
        namespaces.delete(name)
    forget(layout)


def stands(state: State | None) -> bool:
    """Whether this is a lab kept on purpose, of which anything still runs."""
    return (
        state is not None
        and state.standing
        and state.kept
        and any(process.alive() for process in state.services.values())
    )


def sweep() -> None:
    """Remove what killed commands left: labs that do not stand and that no command holds."""
    for name in known():
        layout = Layout(name)
        with contextlib.suppress(LabError), locked(layout):
            if not stands(State.load(layout)):
                destroy(layout)


@contextlib.contextmanager
def made(
    name: str, cells: int, *, kept: bool = False, iptables: str = "auto", report: Report = lambda _: None
) -> Iterator[Lab]:
    """A new lab. Unless it is kept it is removed on leaving; on an error it is removed in any case.

    Raises LabError if one of this name stands; what a killed command left of it is removed first.
    """
    requirements()
    if not 1 <= cells <= MAX_CELLS:
        raise LabError(f"a lab has 1 to {MAX_CELLS} cells, not {cells}")
    layout = Layout(name)
    with locked(layout):
        if stands(State.load(layout)):
            raise LabError(f"lab {name} stands already: see `silkbus lab status`, or end it with `silkbus lab down`")
        destroy(layout)
        state = State(name, kept, [f"cell-{number}" for number in range(1, cells + 1)], iptables)
        lab = Lab(layout, state)
        try:
            lab.build(report)
            yield lab
        except BaseException:
            _undisturbed(lambda: destroy(layout))
            raise
        if not kept:
            _undisturbed(lambda: destroy(layout))


@contextlib.contextmanager
def opened(name: str) -> Iterator[Lab]:
    """The standing lab of this name, held while inside. Raises LabError if there is none."""
    requirements()
    layout = Layout(name)
    with locked(layout):
        state = State.load(layout)
        if state is None or not stands(state):
            raise LabError(f"no lab {name} stands: start it with `silkbus lab up`")
        yield Lab(layout, state)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Whatever asks this process to end raises KeyboardInterrupt while inside, so that a lab is removed first."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in ENDING]
    try:
        yield
    finally:
        for number, handler in zip(ENDING, before, strict=True):
            signal.signal(number, handler)


def _undisturbed(work: Callable[[], None]) -> None:
    """Do `work` to its end: a second Ctrl-C must not leave half of a lab."""
    if threading.current_thread() is not threading.main_thread():  # no other is ever interrupted
        work()
        return
    before = [signal.signal(number, signal.SIG_IGN) for number in ENDING]
    try:
        work()
    finally:
        for number, handler in zip(ENDING, before, strict=True):
            signal.signal(number, handler)
