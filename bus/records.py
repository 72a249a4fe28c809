"""Container records: one JSON file each in a folder, the truth about which containers are on this cell.

The networker is the only writer: write to a temporary file, fsync, rename, fsync the folder. The enforcer and the silk
worker read. A file that cannot be understood is reported and left alone; it never hides the others.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from bus.decode import Malformed
from bus.log import about
from bus.messages import Container, Handle

log = logging.getLogger(__name__)

MAX_HANDLE = 200
_SUFFIX = ".json"


def file_name(handle: Handle) -> str:
    """The name of a container's file: the handle, percent-encoded so that it stays one name in one folder."""
    try:
        encoded = quote(handle, safe="")
    except UnicodeEncodeError:
        raise Malformed(f"handle: {handle!r} is not Unicode text") from None
    if handle.startswith("."):
        encoded = encoded.replace(".", "%2E")
    if not handle or len(encoded) > MAX_HANDLE:
        raise Malformed(f"handle: must have 1 to {MAX_HANDLE} characters (percent-encoded), not {len(encoded)}")
    return encoded + _SUFFIX


class Records:
    """The records in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, handle: Handle) -> Container | None:
        """The record of `handle`, or None. Raises Malformed or OSError for one that cannot be understood or read."""
        return self._read(self.folder / file_name(handle))

    def all(self) -> list[Container]:
        """Every record that can be understood, in the order of their files."""
        return list(self._readable())

    def put(self, container: Container) -> None:
        """Write a record, durably. Raises OSError (a full disk, say), and then the old one is still there."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / file_name(container.handle)
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("w") as file:
                json.dump(container.encode(), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._sync_folder()

    def delete(self, handle: Handle) -> None:
        """Forget a record, durably; one that is not there is no error."""
        path = self.folder / file_name(handle)
        if path.exists():
            path.unlink()
            self._sync_folder()

    def _readable(self) -> Iterator[Container]:
        for path in sorted(self.folder.glob("*" + _SUFFIX)):
            try:
                container = self._read(path)
            except (Malformed, OSError) as error:
                log.error("unreadable container record, left alone", extra=about(file=str(path), error=str(error)))
                continue
            if container is not None:
                yield container

    def _read(self, path: Path) -> Container | None:
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{path}: not JSON: {error}") from None
        container = Container.decode(content, str(path))
        if file_name(container.handle) != path.name:
            raise Malformed(f"{path}: handle: {container.handle!r} belongs into {file_name(container.handle)}")
        return container

    def _sync_folder(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
