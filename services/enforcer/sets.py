"""The two ipsets: which tag a container's traffic gets, and from which hosts VXLAN is accepted.

Single changes go over netlink (0.5 ms each), many through one `ipset restore`. Members are changed one by one and a set
is never flushed or swapped: a rule that looks into it must not see it empty.
"""

import shutil
import subprocess
from collections.abc import Mapping
from ipaddress import IPv4Address

from pyroute2 import IPSet
from pyroute2.netlink.exceptions import NetlinkError

from services.enforcer.setlist import listing, members

Members = Mapping[IPv4Address, int]
"""Address -> the mark it stands for; 0 in a set without marks."""

BULK = 16
"""From so many changes on, one process is cheaper than messages one by one."""
TIMEOUT = 60.0
_FULL_MASK = 0xFFFFFFFF


class IpsetError(Exception):
    """ipset did not do as told. The text has its words."""


class AddressSet:
    """One set of type hash:ip, with a mark a member if `marks`."""

    def __init__(self, name: str, *, marks: bool = False) -> None:
        self.name = name
        self.marks = marks
        self._members: dict[IPv4Address, int] = {}
        self._listing: bytes | None = None
        """What the kernel said last, if it was as noted and we have changed nothing since."""

    def open(self) -> None:
        """Make the set if there is none, and read what it holds. Raises IpsetError (another type, say)."""
        options = "skbinfo" if self.marks else ""
        _ipset(f"create -exist {self.name} hash:ip family inet {options}\n", "restore")
        self.read()

    def read(self) -> None:
        """Look at the kernel anew. Raises OSError."""
        self._listing = listing(self.name)
        self._members = members(self._listing)

    def doubtful(self) -> bool:
        """Whether the set is other than noted: somebody else changed it, or took it away. Cheap."""
        try:
            found = listing(self.name)
        except OSError:
            return True
        if found == self._listing:
            return False
        if members(found) != self._members:
            return True
        self._listing = found
        return False

    def become(self, wanted: Members) -> int:
        """Make the set hold these and no others; how many members that changed."""
        return self.change({**dict.fromkeys(self._members), **wanted})

    def change(self, wanted: Mapping[IPv4Address, int | None]) -> int:
        """Set members, or take out those that are None; how many that changed. Raises IpsetError."""
        changes = {address: mark for address, mark in wanted.items() if self._members.get(address) != mark}
        if changes:
            self._listing = None
        if len(changes) >= BULK:
            _ipset("".join(self._line(address, mark) for address, mark in changes.items()), "restore", "-exist")
        elif changes:
            self._change_singly(changes)
        for address, mark in changes.items():
            if mark is None:
                del self._members[address]
            else:
                self._members[address] = mark
        return len(changes)

    def _line(self, address: IPv4Address, mark: int | None) -> str:
        if mark is None:
            return f"del {self.name} {address}\n"
        return f"add {self.name} {address}" + (f" skbmark {mark:#x}\n" if self.marks else "\n")

    def _change_singly(self, changes: Mapping[IPv4Address, int | None]) -> None:
        with IPSet() as ipset:
            for address, mark in changes.items():
                extra = {"skbmark": (mark, _FULL_MASK)} if self.marks and mark is not None else {}
                try:
                    if mark is None:
                        ipset.delete(self.name, str(address), exclusive=False)
                    else:
                        ipset.add(self.name, str(address), exclusive=False, **extra)
                except NetlinkError as error:
                    raise IpsetError(f"ipset {self.name}: {address}: {error}") from None


def _ipset(text: str | None, *arguments: str) -> str:
    path = shutil.which("ipset")
    if path is None:
        raise IpsetError("ipset: not found; install the package ipset")
    try:
        done = subprocess.run(  # noqa: S603 (our own words, no shell)
            [path, *arguments], input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise IpsetError(f"ipset {arguments[0]}: no answer within {TIMEOUT:g} s") from None
    if done.returncode != 0:
        raise IpsetError(f"ipset {arguments[0]}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout
