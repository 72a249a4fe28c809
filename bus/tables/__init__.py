"""Tables: maps from key to full desired value with a revision, the one protocol between the centre and the cells.

    SQL ──Ledger──▶ Publisher ──NATS──▶ Replica ──▶ listeners (Update: differences, whole revisions)

`state` is a table's content with its digest; `protocol` is what is sent; `publisher` sends what SQL committed;
`follower` decides what a replica does, without any I/O; `replica` does it; `cache` keeps it on disk.
"""

from bus.tables.publisher import Publisher
from bus.tables.replica import Replica
from bus.tables.table import LEASES, POLICIES, SECURITY_GROUPS, Key, Table, Update

__all__ = ["LEASES", "POLICIES", "SECURITY_GROUPS", "Key", "Publisher", "Replica", "Table", "Update"]
