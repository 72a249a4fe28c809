"""A file that people edit while the server runs: looked at on each use (one stat), read again when it changed.

While it cannot be read or understood it has no content, rather than its old one, because what was taken out of it must
stop to count; so replace it by renaming, not by writing into it.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from bus.decode import Fields, Malformed
from bus.log import about

log = logging.getLogger(__name__)

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """The content of the JSON object in `path`, decoded by `decode`. `kind` names it in errors, as "token file".

    Raises Malformed when the file cannot be used at start.
    """

    def __init__(self, kind: str, path: Path, decode: Callable[[Fields], T]) -> None:
        self._kind = kind
        self._path = path
        self._decode = decode
        self._seen = _state(path)
        self._content: T | None = self._read()

    def content(self) -> T | None:
        """What the file holds now; None while it cannot be used."""
        state = _state(self._path)
        if state == self._seen:
            return self._content
        self._seen = state
        try:
            self._content = self._read()
        except Malformed as error:
            self._content = None
            log.error("%s unusable; nothing in it counts until it is mended", self._kind, extra=about(error=str(error)))
        else:
            log.info("%s read again", self._kind, extra=about(file=str(self._path)))
        return self._content

    def _read(self) -> T:
        where = f"{self._kind} {self._path}"
        try:
            content: Any = json.loads(self._path.read_bytes())
        except OSError as error:
            raise Malformed(f"{where}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{where}: is not JSON: {error}") from None
        return self._decode(Fields(content, where))


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None while it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
