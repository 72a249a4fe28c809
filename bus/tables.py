"""Tables: maps from key to full desired value with a revision, the one protocol between the centre and the cells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bus.messages import Lease, Ports, Revision, Tag, decode_lease_entry, decode_policy_entry

V = TypeVar("V")
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table(Generic[V]):
    """A table's name and how its values are read. `decode` raises `Malformed`."""

    name: str
    decode: Callable[[Key, Any], V]


POLICIES: Table[tuple[Ports, ...] | Tag] = Table("policies", decode_policy_entry)
LEASES: Table[Lease] = Table("leases", decode_lease_entry)


@dataclass(frozen=True, slots=True)
class Update(Generic[V]):
    """What changed in a replica, applied as a whole: key -> new value, or None for one that is gone.

    A snapshot arrives as the difference to what the replica held, so a listener only ever sees differences.
    """

    revision: Revision
    changes: Mapping[Key, V | None]
