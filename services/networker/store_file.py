"""The file format of the original's metadata store (contract/cell.md 2.8): three files, read and written under a lock.

FILE holds `{"HANDLE": {"handle": …, "ip": …, "metadata": {…}|null}}`; `FILE_lock` is what readers and writers lock;
`FILE_version` is a number that grows with each write, by which a reader knows that what it has read is still so. The
files are written in place, since a reader may hold them open. The data goes over the old ones and is cut behind them,
not the other way round: readers decode the first JSON value of the file, so a writer that dies in between leaves them
either the old content or the new.
"""

import fcntl
import grp
import os
import pwd
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bus.messages import Container, Handle
from services.networker.go_json import go_output
from services.networker.record import OURS

FIRST_VERSION = 1
"""What readers take for the version where there is no file, or an empty one."""
_VERSION = re.compile(rb"\s*([0-9]{1,18})\s*")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose the files are to be, by name."""

    user: str
    group: str

    def numbers(self) -> tuple[int, int]:
        """Raises OSError for names that nobody has."""
        try:
            return pwd.getpwnam(self.user).pw_uid, grp.getgrnam(self.group).gr_gid
        except KeyError as error:
            raise OSError(f"the store's owner: {error.args[0]}") from None


def entry(container: Container) -> dict[str, Any]:
    """What the store says of a container: address, and metadata as the runtime gave it, null if it gave none."""
    metadata = {name: value for name, value in container.metadata.items() if name != OURS}
    return {"handle": container.handle, "ip": str(container.address), "metadata": metadata or None}


class StoreFile:
    """The store at `path`. All of it blocks, for other processes' locks never: that is an error, to be tried again."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        self.path = path
        self._owner = owner

    def keep(self, entries: Mapping[Handle, Mapping[str, Any]], *, anew: bool = False) -> bool:
        """Have the store hold these entries and no others; whether it was written. With `anew` it is in any case.

        Raises BlockingIOError while somebody else has the lock, or OSError.
        """
        text = go_output({str(handle): dict(each) for handle, each in entries.items()}, sort_keys=True)
        # JSON can say half a surrogate, which UTF-8 cannot; Go reads it as U+FFFD.
        content = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        self._make_folder()
        with self._open("_lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._open("") as data, self._open("_version") as version:
                if not anew and _read(data) == content:
                    return False
                found = _VERSION.fullmatch(_read(version))
                number = int(found[1]) if found else FIRST_VERSION
                _overwrite(data, content)
                # Without a newline: readers do not take one for part of a number.
                _overwrite(version, str(number + 1).encode())
        return True

    def _make_folder(self) -> None:
        """The folder, if there is none, is the owner's too: its readers are not root, and make the lock if need be."""
        if not self.path.parent.exists():
            owner = None if self._owner is None else self._owner.numbers()  # first, or it would stay another's
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if owner is not None:
                os.chown(self.path.parent, *owner)

    @contextmanager
    def _open(self, suffix: str) -> Iterator[int]:
        """One of the files. A link is not followed: the folder may be another user's, who must not choose the file."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(f"{self.path}{suffix}", flags, 0o600)
        try:
            if self._owner is not None:
                os.fchown(descriptor, *self._owner.numbers())
            yield descriptor
        finally:
            os.close(descriptor)


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _overwrite(descriptor: int, content: bytes) -> None:
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)
    os.ftruncate(descriptor, len(content))
