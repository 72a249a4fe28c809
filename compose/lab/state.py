"""What is written down about a lab: its folders, its lock, and state.json.

A lab is more than a process: `lab up` ends and the lab stands. So every command reads this state, under the lab's lock,
and writes it back whole. A lab whose command was killed has state that says so (`standing` is false, or it was never
to outlive its command), and namespaces that can be found by their names alone.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from compose.lab.processes import Process

RUN_ROOT = Path("/run/silkbus-lab")
"""Sockets, locks and state of all labs: gone after a reboot, as their namespaces are."""
DATA_ROOT = Path("/var/lib/silkbus-lab")
"""Databases, records and logs: on a disk, so that what a commit costs here is what it costs elsewhere."""

_NAME = re.compile(r"[a-z0-9]{1,16}")
_APP = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_TAKEN = ("cell", "centre", "underlay")


class LabError(Exception):
    """Something a person asked of a lab cannot be done; the text says why, and what can."""


@dataclass(frozen=True, slots=True)
class App:
    """One container of the lab: an instance of an app, on a cell."""

    handle: str
    app: str
    guid: str
    cell: str
    namespace: str
    address: str
    process: Process
    add_seconds: float
    """Wall time of the whole CNI ADD, the shim's process included."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and folders of a lab. Names have no '-', so that no lab's prefix begins another's."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LabError(f"{self.name!r} cannot be a lab's name: use 1 to 16 small letters and digits")

    @property
    def prefix(self) -> str:
        return f"sb-{self.name}-"

    @property
    def run(self) -> Path:
        return RUN_ROOT / self.name

    @property
    def data(self) -> Path:
        return DATA_ROOT / self.name

    def namespace(self, part: str) -> str:
        return self.prefix + part

    def log(self, service: str) -> Path:
        return self.data / "log" / f"{service.replace('/', '-')}.log"

    def cell_run(self, cell: str) -> Path:
        return self.run / cell

    def cell_state(self, cell: str) -> Path:
        return self.data / cell

    def socket(self, cell: str, service: str) -> Path:
        return self.cell_run(cell) / service / f"{service}.sock"

    @property
    def tokens(self) -> Path:
        return self.data / "tokens.json"

    @property
    def token(self) -> Path:
        return self.data / "token"

    @property
    def directory(self) -> Path:
        return self.data / "directory.json"


def app_name(text: str) -> str:
    """A name that may be an app's: it becomes part of a namespace's name. Raises LabError."""
    if not _APP.fullmatch(text) or text in _TAKEN:
        raise LabError(
            f"{text!r} cannot be an app's name: use 1 to 32 small letters, digits and '-', beginning with a letter, "
            f"and none of {', '.join(_TAKEN)}"
        )
    return text


@dataclass
class State:
    """The content of state.json. `kept` labs outlive the command that made them; others are leftovers without it."""

    name: str
    kept: bool
    cells: list[str]
    iptables: str = "auto"
    standing: bool = False
    port: int = 0
    services: dict[str, Process] = field(default_factory=dict)
    apps: dict[str, App] = field(default_factory=dict)

    def save(self, layout: Layout) -> None:
        temporary = layout.run / "state.tmp"
        temporary.write_text(json.dumps(asdict(self), default=str, indent=1))
        temporary.replace(layout.run / "state.json")

    @classmethod
    def load(cls, layout: Layout) -> "State | None":
        """The lab's state, or None if there is none that can be read."""
        try:
            content: dict[str, Any] = json.loads((layout.run / "state.json").read_text())
            services = {name: Process.decode(item) for name, item in content.pop("services").items()}
            apps = {
                name: App(**{**item, "process": Process.decode(item["process"])})
                for name, item in content.pop("apps").items()
            }
            return cls(**content, services=services, apps=apps)
        except (OSError, ValueError, TypeError, KeyError):
            return None


@contextlib.contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Hold the lab's lock while inside. Raises LabError at once if another command holds it."""
    file = _lock(layout)
    try:
        yield
    finally:
        # Unlinked while held: who waits for nothing (LOCK_NB) and opened the old file finds that out in _lock.
        _lock_path(layout).unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):
            RUN_ROOT.rmdir()


def _lock_path(layout: Layout) -> Path:
    return RUN_ROOT / f"{layout.name}.lock"


def _lock(layout: Layout) -> TextIO:
    path = _lock_path(layout)
    while True:
        RUN_ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # another lab's end removed the empty folder between the two
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise LabError(f"lab {layout.name} is in use by another command (pid {holder}); wait for its end") from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
        file.close()


def forget(layout: Layout) -> None:
    """Remove a lab's folders."""
    for folder, root in ((layout.run, RUN_ROOT), (layout.data, DATA_ROOT)):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            root.rmdir()


def known() -> list[str]:
    """The names of the labs that have a folder."""
    found = {
        entry.name for root in (RUN_ROOT, DATA_ROOT) if root.is_dir() for entry in root.iterdir() if entry.is_dir()
    }
    return sorted(name for name in found if _NAME.fullmatch(name))
