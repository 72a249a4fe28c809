"""What the worker was asked to attach: one small file a container, in a folder of its own.

The kernel says which links there are. Only a note says where the other end of one that vanished was, what limits it
had, and that a link without a handle is what a crash of ours left, and not somebody else's.

Nothing is synced to disk: a machine that goes down takes all links with it, and notes mean nothing without them.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from bus.decode import Fields
from bus.log import about
from bus.messages import Handle
from bus.records import file_name
from services.silk.bandwidth import UNLIMITED, Bandwidth

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Note:
    """One attachment. `interface` is its name in the container, `mac` that end's if it was asked for.

    `complete` is false while the link is being made. `namespace` is the kernel's number of the container's network
    namespace, never used twice, so that another one at the same path is not taken for it; 0 is unknown. `network` is
    the runtime's name of the network, where a runtime asked us directly.
    """

    handle: Handle
    netns: str
    interface: str
    address: IPv4Address
    mac: str | None = None
    bandwidth: Bandwidth = UNLIMITED
    network: str | None = None
    namespace: int = 0
    complete: bool = False

    def encode(self) -> dict[str, Any]:
        return {
            "handle": self.handle,
            "netns": self.netns,
            "interface": self.interface,
            "address": str(self.address),
            "mac": self.mac,
            "bandwidth": self.bandwidth.encode(),
            "network": self.network,
            "namespace": self.namespace,
            "complete": self.complete,
        }

    @classmethod
    def decode(cls, value: object, where: str) -> "Note":
        fields = Fields(value, where)
        return cls(
            Handle(fields.text("handle")),
            fields.text("netns"),
            fields.text("interface", max_length=15),
            fields.address("address"),
            fields.optional_text("mac"),
            Bandwidth.decode(fields.mapping("bandwidth"), f"{where}: bandwidth"),
            fields.optional_text("network"),
            fields.integer("namespace", high=2**64 - 1),
            fields.flag("complete"),
        )


class Notes:
    """The notes in one folder, read once: the worker is the only writer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes = {note.handle: note for note in _read(folder)}

    def get(self, handle: Handle) -> Note | None:
        return self._notes.get(handle)

    def all(self) -> list[Note]:
        return list(self._notes.values())

    def put(self, note: Note) -> None:
        """Write a note. Raises OSError, and then the old one is still there."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / file_name(note.handle)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(note.encode()))
        temporary.replace(path)
        self._notes[note.handle] = note

    def delete(self, handle: Handle) -> None:
        """Forget a note; one that is not there is no error. Raises OSError."""
        if self._notes.pop(handle, None) is not None:
            (self._folder / file_name(handle)).unlink(missing_ok=True)


def _read(folder: Path) -> Iterator[Note]:
    for path in sorted(folder.glob("*.json")):
        try:
            yield Note.decode(json.loads(path.read_bytes()), str(path))
        except (OSError, ValueError, RecursionError) as error:
            # Its link, if there is one, has the handle all the same.
            log.warning("a note of an attachment is not used", extra=about(file=str(path), error=str(error)))
