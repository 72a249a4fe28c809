"""An event: its id, and its form as a CloudEvent 1.0 on NATS.

The form is the binary content mode of the CloudEvents NATS binding: each attribute is a header with the prefix `ce-`,
and the message is the data alone (msgpack with the version of the protocol). The binding as last released has no binary
mode; this is the one of its next version, 1.0.3, which NATS 2.2's headers made possible.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bus import subjects
from bus.messages import Revision
from bus.tables.table import Key
from bus.wire import encode, pack

if TYPE_CHECKING:
    from bus.ledger import LogEntry

_ID = re.compile(r"([^.]+)\.(\d{1,18})\.(\d{1,9})\.([0-9a-f]{16})")
_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


@dataclass(frozen=True, slots=True)
class EventId:
    """`TABLE.REVISION.INDEX.CHANGE`: the INDEX-th event, from 0, of one change of a table.

    CHANGE is a hash of what only that change has (the database's epoch, the request, the time), because revisions come
    again when a database is restored from a dump or made anew. So equal ids mean the same event, ever.
    """

    table: str
    revision: Revision
    index: int
    change: str

    def __str__(self) -> str:
        return f"{self.table}.{self.revision}.{self.index}.{self.change}"

    @classmethod
    def parse(cls, text: str) -> "EventId | None":
        """The id that `text` is, or None."""
        if (match := _ID.fullmatch(text)) is None:
            return None
        table, revision, index, change = match.groups()
        return cls(table, Revision(int(revision)), int(index), change)


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `kind` is as "policy.added", `about` the key of the table's entry to which it happened."""

    id: EventId
    epoch: str
    kind: str
    about: Key
    at_ms: int
    data: Mapping[str, Any]

    @property
    def subject(self) -> str:
        return subjects.event(self.id.table, self.kind)

    def headers(self, previous: EventId | None) -> dict[str, str]:
        """The attributes. `previous` is the event before this one in the change log, if there is one."""
        attributes = {
            "specversion": "1.0",
            "id": str(self.id),
            "source": f"/silkbus/{self.id.table}/{self.epoch}",
            "type": f"org.silkbus.{self.kind}.v1",
            "subject": "/".join(self.about),
            "time": datetime.fromtimestamp(self.at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
            "datacontenttype": "application/msgpack",
            "revision": str(self.id.revision),
        }
        if previous is not None:
            attributes["previous"] = str(previous)
        return {f"ce-{name}": header_value(value) for name, value in attributes.items()}

    @property
    def body(self) -> bytes:
        return encode(self.data)


def header_value(text: str) -> str:
    """Text as a header's value: blanks, quotes, percent signs and all but printable ASCII percent-encoded."""
    return quote(text, safe=_PLAIN)


def change_hash(epoch: str, entry: "LogEntry") -> str:
    """What tells this change from every other one, in this database and all others: 16 hexadecimal digits."""
    made = pack([epoch, entry.revision, entry.request_id, entry.changed_at_ms])
    return hashlib.blake2b(made, digest_size=8).hexdigest()


def events_of(table: str, epoch: str, entry: "LogEntry") -> list[Event]:
    """The events of one change, in order."""
    change = change_hash(epoch, entry)
    return [
        Event(
            id=EventId(table, entry.revision, index, change),
            epoch=epoch,
            kind=event["kind"],
            about=tuple(event["about"]),
            at_ms=entry.changed_at_ms,
            data=event["data"],
        )
        for index, event in enumerate(entry.events)
    ]
