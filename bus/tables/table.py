"""A table's name and types, its content, and its digest."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from bus.decode import Malformed
from bus.messages import (
    Lease,
    Ports,
    Revision,
    SecurityGroup,
    Tag,
    decode_lease_entry,
    decode_policy_entry,
    decode_security_group_entry,
)
from bus.wire import pack, unpack_each

V = TypeVar("V")
Key = tuple[str, ...]
Changes = tuple[tuple[Key, bytes | None], ...]
"""Packed values by key; None for a key that is gone."""

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Table(Generic[V]):
    """A table's name and how its values are read. `decode` raises `Malformed`."""

    name: str
    decode: Callable[[Key, Any], V]


POLICIES: Table[tuple[Ports, ...] | Tag] = Table("policies", decode_policy_entry)
LEASES: Table[Lease] = Table("leases", decode_lease_entry)
SECURITY_GROUPS: Table[SecurityGroup] = Table("security_groups", decode_security_group_entry)


@dataclass(frozen=True, slots=True)
class Update(Generic[V]):
    """What changed in a replica, applied as a whole: key -> new value, or None for one that is gone.

    A snapshot arrives as the difference to what the replica held, so a listener only ever sees differences.
    """

    revision: Revision
    changes: Mapping[Key, V | None]


def as_key(value: object) -> Key:
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise Malformed(f"table key: must be a list of texts, not {value!r}")


def as_changes(value: object) -> Changes:
    """Changes as they travel: [[key, packed value or None]…]. Raises Malformed."""
    if not isinstance(value, (list, tuple)):
        raise Malformed(f"table changes: must be a list, not {type(value).__name__}")
    changes: list[tuple[Key, bytes | None]] = []
    for item in value:
        match item:
            case [key, bytes(data)]:
                changes.append((as_key(key), data))
            case [key, None]:
                changes.append((as_key(key), None))
            case _:
                raise Malformed(f"table change: must be [key, bytes or nothing], not {item!r}")
    return tuple(changes)


def unpack_changes(data: bytes, where: str) -> Changes:
    """The changes of an answer: one or more packed lists of them, one after the other, the last word on a key last."""
    return tuple(change for items in unpack_each(data, where) for change in as_changes(items))


def _hash(key: Key, data: bytes) -> int:
    packed = pack([list(key), data])
    return int.from_bytes(hashlib.blake2b(packed, digest_size=DIGEST_BYTES).digest(), "big")


@dataclass(slots=True)
class Content:
    """A table's packed entries at one revision of one epoch, with a digest kept as they change.

    The digest is the sum of the entries' hashes, so it does not depend on the order in which they came.
    """

    epoch: str = ""
    revision: Revision = Revision(0)
    entries: dict[Key, bytes] = field(default_factory=dict)
    _sum: int = 0

    @classmethod
    def of(cls, epoch: str, revision: Revision, entries: Mapping[Key, bytes]) -> "Content":
        content = cls(epoch, revision)
        content.apply(revision, tuple(entries.items()))
        return content

    @property
    def digest(self) -> bytes:
        return self._sum.to_bytes(DIGEST_BYTES, "big")

    def apply(self, revision: Revision, changes: Changes) -> None:
        for key, data in changes:
            old = self.entries.pop(key, None)
            if old is not None:
                self._sum -= _hash(key, old)
            if data is not None:
                self.entries[key] = data
                self._sum += _hash(key, data)
        self._sum %= 1 << (8 * DIGEST_BYTES)
        self.revision = revision

    def difference(self, other: "Content") -> Changes:
        """The changes that make this content's entries equal to the other's."""
        gone = [(key, None) for key in self.entries if key not in other.entries]
        new = [(key, data) for key, data in other.entries.items() if self.entries.get(key) != data]
        return (*gone, *new)
