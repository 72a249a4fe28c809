"""A reader of the metadata store that behaves as the original's (contract/cell.md 2.8)."""

import fcntl
import json
from pathlib import Path
from typing import Any


class StoreReader:
    """It locks, and reads the data again only if the version is another one; strict in what it takes for a number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: int | None = None
        self._cached: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        with Path(f"{self._path}_lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = Path(f"{self._path}_version")
            text = file.read_text() if file.exists() else ""
            assert text == "" or (text.isascii() and text.isdigit()), f"version file: {text!r} is not a number"
            version = int(text or "1")
            if version != self._version:
                data = self._path.read_bytes().decode() if self._path.exists() else ""
                # As Go's Decoder does: the first value of the file.
                self._cached = json.JSONDecoder().raw_decode(data)[0] if data.strip() else {}
                self._version = version
            return self._cached
