"""Which address of the cell's subnet a new container gets.

What is in use is not kept here: it is what records and kernel links say at that moment, together. Kept is only the
order in which addresses were released, so that the one used longest ago is given again last of all: peers may still
hold connections and names that mean the old container.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from urllib.parse import unquote

from bus.decode import Fields, Malformed
from bus.log import about
from bus.messages import Container, Handle
from bus.records import Records

log = logging.getLogger(__name__)

RESERVED = 2
"""The first addresses, which are no container's: the network (the VTEP's own) and .1 (contract/cell.md 3.5)."""


class Exhausted(Exception):
    """Every address of the subnet is in use."""


def usable(subnet: IPv4Network) -> Iterator[IPv4Address]:
    """The addresses containers may have, ascending: all but the first two and the broadcast address."""
    first, last = int(subnet.network_address), int(subnet.broadcast_address)
    return (IPv4Address(value) for value in range(first + RESERVED, last))


class AddressPool:
    """Chooses addresses of one subnet. `file` remembers the order of releases; losing it loses only that order."""

    def __init__(self, subnet: IPv4Network, file: Path) -> None:
        self.subnet = subnet
        self._file = file
        self._released = [address for address in _read(file) if address in subnet]

    def choose(self, in_use: Collection[IPv4Address]) -> IPv4Address:
        """A free address: the lowest that was never released, else the one released longest ago. Raises Exhausted."""
        released = set(self._released)
        free = [address for address in usable(self.subnet) if address not in in_use]
        fresh = next((address for address in free if address not in released), None)
        if fresh is not None:
            return fresh
        if self.subnet.prefixlen == self.subnet.max_prefixlen:
            raise Exhausted(f"this cell has the single overlay address {self.subnet.network_address}: no containers")
        if not free:
            count = sum(1 for _ in usable(self.subnet))
            raise Exhausted(f"all {count} addresses of subnet {self.subnet} are in use: remove containers of this cell")
        order = {address: position for position, address in enumerate(self._released)}
        return min(free, key=lambda address: order[address])

    def release(self, address: IPv4Address) -> None:
        """Note that a container no longer has this address."""
        if address not in self.subnet:
            return
        self._released = [other for other in self._released if other != address] + [address]
        temporary = self._file.with_suffix(".tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_text(json.dumps({"released": [str(each) for each in self._released]}))
            temporary.replace(self._file)
        except OSError as error:
            fields = about(file=str(self._file), error=str(error))
            log.warning("the order of released addresses is not saved", extra=fields)


def _read(file: Path) -> list[IPv4Address]:
    try:
        return [IPv4Address(item) for item in Fields(json.loads(file.read_bytes()), str(file)).items("released")]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("the order of released addresses is lost", extra=about(file=str(file), error=str(error)))
        return []


class RecordedAddresses:
    """The addresses that container records name, re-reading only the files that changed since the last time."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._known: dict[str, tuple[tuple[int, int, int], Container | None]] = {}

    def by_handle(self) -> dict[Handle, IPv4Address]:
        """Handle -> address, of every record that has one. A record that cannot be read is reported and left out."""
        known = {}
        try:
            entries = list(os.scandir(self._records.folder))
        except FileNotFoundError:
            entries = []
        for entry in entries:
            if not entry.name.endswith(".json"):
                continue
            try:
                status = entry.stat()
                # A record is only ever replaced as a whole, so a changed one is another file.
                identity = (status.st_ino, status.st_mtime_ns, status.st_size)
                previous = self._known.get(entry.name)
                known[entry.name] = previous if previous and previous[0] == identity else (identity, self._read(entry))
            except FileNotFoundError:
                continue
        self._known = known
        containers = [container for _, container in known.values() if container is not None]
        return {each.handle: each.address for each in containers if each.address is not None}

    def _read(self, entry: "os.DirEntry[str]") -> Container | None:
        try:
            return self._records.get(Handle(unquote(entry.name.removesuffix(".json"))))
        except (Malformed, OSError) as error:
            log.error("unreadable container record, left alone", extra=about(file=entry.path, error=str(error)))
            return None
