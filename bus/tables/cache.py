"""A replica's last state on disk, with the wall-clock time when the centre last confirmed it.

Written to a temporary file and renamed, so that what is there is always whole. A file that cannot be read or understood
counts as none. (No fsync: after a power loss an older or no state is found, which the centre or deny-all repairs.)
"""

import logging
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from bus.decode import Malformed
from bus.log import about
from bus.messages import Revision
from bus.tables.table import Content, as_changes
from bus.wire import decode, encode, pack, unpack

log = logging.getLogger(__name__)

MAX_FUTURE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Cached:
    content: Content
    age: float
    """Seconds since the centre last confirmed it."""


def load(path: Path, table: str) -> Cached | None:
    """The state kept at `path`, or None."""
    try:
        return _parse(path.read_bytes(), table)
    except FileNotFoundError:
        return None
    except (OSError, Malformed, zlib.error) as error:
        log.warning("table cache not usable", extra=about(table=table, file=str(path), error=str(error)))
        return None


def _parse(data: bytes, table: str) -> Cached:
    fields = decode(data, f"cache of {table}")
    if fields.text("table") != table:
        raise fields.malformed("table", f"is another one's, not {table}")
    age = time.time() - fields.number("confirmed_at")
    if age < -MAX_FUTURE_SECONDS:
        raise fields.malformed("confirmed_at", "lies in the future: the clock was set back")
    changes = as_changes(unpack(zlib.decompress(fields.data("entries")), fields.where))
    content = Content.of(
        fields.text("epoch"),
        Revision(fields.integer("revision")),
        {key: value for key, value in changes if value is not None},
    )
    if content.digest != fields.data("digest"):
        raise fields.malformed("digest", "does not fit the entries")
    return Cached(content, max(0.0, age))


def _dump(content: Content, table: str, age: float) -> bytes:
    entries = pack([[list(key), data] for key, data in content.entries.items()])
    return encode(
        {
            "table": table,
            "epoch": content.epoch,
            "revision": content.revision,
            "digest": content.digest,
            "confirmed_at": time.time() - age,
            "entries": zlib.compress(entries, 1),
        }
    )


def store(path: Path, content: Content, table: str, age: float) -> None:
    """Replace what is at `path` by a content that was confirmed `age` seconds ago.

    Raises OSError, and then the old state is still there.
    """
    data = _dump(content, table, age)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
