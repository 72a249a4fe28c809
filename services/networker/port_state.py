"""The state file of the original's port allocator (contract/cell.md 1.7): `{"acquired_ports": {HANDLE: [PORT…]}}`.

Which ports are taken our records say. The file is kept in step for what else reads it, and whatever it holds of handles
that we do not know is left alone, and not given out, until their `down`: they may be containers that the original made.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bus.decode import Malformed
from bus.log import about
from services.networker.go_json import Struct, first_value

log = logging.getLogger(__name__)


def acquired(path: str) -> dict[str, list[int]]:
    """The ports of each handle. Blocks. Raises OSError."""
    with _locked(path) as descriptor:
        return _read(descriptor, path)


def keep(path: str, handle: str, ports: Iterable[int]) -> None:
    """Have the file say that a handle has these ports and no others. Blocks. Raises OSError."""
    wanted = sorted(set(ports))
    with _locked(path) as descriptor:
        found = _read(descriptor, path)
        if found.get(handle, []) == wanted:
            return
        found[handle] = wanted
        content = {"acquired_ports": {name: each for name, each in sorted(found.items()) if each}}
        # In place, since the lock is the file's.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content, separators=(",", ":")).encode() + b"\n", 0)


@contextmanager
def _locked(path: str) -> Iterator[int]:
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: str) -> dict[str, list[int]]:
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    if not data.strip():
        return {}
    try:
        entries: dict[str, Any] = Struct(first_value(data.decode(errors="replace")), "State").get(
            "acquired_ports", "map", {}
        )
    except Malformed as error:
        # The original cannot go on with such a file; we can, since our records know better.
        log.error("unreadable state of ports, written anew", extra=about(file=path, error=str(error)))
        return {}
    return {
        handle: [port for port in ports if type(port) is int]
        for handle, ports in entries.items()
        if isinstance(ports, list)
    }
