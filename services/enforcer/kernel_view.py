"""Whether the kernel holds, at this moment, certain chains and set members: looked at anew, not as it was noted.

Only for who asks (explain): on nf_tables a process a chain (4 ms), on legacy tables, where any look costs the whole
table, one for each table. Blocks.
"""

import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address

from services.enforcer.rules import ChainId
from services.enforcer.settings import Kind

TIMEOUT = 30.0
MANY = 40
"""From so many chains of a table on, one look at the whole of it is cheaper."""
_HASH = re.compile(r' --comment "?sb:([0-9a-f]{12})"?(?: |$)')
_COUNTERS = re.compile(r"^\[(\d+):(\d+)\] ")
_COUNTED = re.compile(r" -c (\d+) (\d+)(?: |$)")


class CannotLook(Exception):
    """The kernel could not be looked at. The text says why."""


@dataclass(frozen=True, slots=True)
class HeldRule:
    """One rule in the kernel: the hash that ours carry ('' for others'), and the packets and bytes that met it."""

    hash: str
    packets: int
    bytes: int


Held = Mapping[ChainId, tuple[HeldRule, ...]]
"""A chain that is not in the kernel is not in here."""


def held(kind: Kind, chains: Collection[ChainId]) -> Held:
    """What the kernel holds of these chains. Raises CannotLook."""
    found: dict[ChainId, tuple[HeldRule, ...]] = {}
    for table in {chain.table for chain in chains}:
        names = {chain.name for chain in chains if chain.table == table}
        if kind == "nft" and len(names) < MANY:
            for name in names:
                # A chain that is not there is an error of its own kind, told from others by looking for it.
                lines = _run(f"iptables-{kind}", "-t", table, "-S", name, "-v", absent=True)
                found.update(_parse(table, lines, names))
        else:
            found.update(_parse(table, _run(f"iptables-{kind}-save", "-c", "-t", table), names))
    return found


def whole_table(kind: Kind, table: str) -> Held:
    """Everything in one table. Raises CannotLook."""
    return dict(_parse(table, _run(f"iptables-{kind}-save", "-c", "-t", table), None))


def marks(name: str) -> Mapping[IPv4Address, int]:
    """The members of a set of type hash:ip, with their marks; 0 for one without. Raises CannotLook."""
    members = {}
    for line in _run("ipset", "save", name):
        match line.split():
            case ["add", _, address, "skbmark", mark]:
                members[IPv4Address(address)] = int(mark.partition("/")[0], 16)
            case ["add", _, address, *_]:
                members[IPv4Address(address)] = 0
    return members


def _parse(
    table: str, lines: Iterable[str], names: Collection[str] | None
) -> Iterator[tuple[ChainId, tuple[HeldRule, ...]]]:
    """The chains in what `-S -v` or `save -c` printed; only those of `names`, if given."""
    chains: dict[str, list[HeldRule]] = {}
    for line in lines:
        if line.startswith((":", "-N ", "-P ")):
            name = line[1:].split()[0] if line[0] == ":" else line.split()[1]
            if names is None or name in names:
                chains.setdefault(name, [])
            continue
        counted = _COUNTERS.match(line)
        body = line[counted.end() :] if counted else line
        if not body.startswith("-A "):
            continue
        rules = chains.get(body[3 : body.index(" ", 3)] if " " in body[3:] else body[3:])
        if rules is None:
            continue
        counted = counted or _COUNTED.search(body)
        found = _HASH.search(body)
        packets, size = (int(counted[1]), int(counted[2])) if counted else (0, 0)
        rules.append(HeldRule(found[1] if found else "", packets, size))
    for name, rules in chains.items():
        yield ChainId(table, name), tuple(rules)


def _run(program: str, *arguments: str, absent: bool = False) -> list[str]:
    """The lines that a program prints; none for a chain that is not there, if `absent` allows that."""
    path = shutil.which(program)
    if path is None:
        raise CannotLook(f"{program}: not found")
    try:
        done = subprocess.run(  # noqa: S603 (our own words, no shell)
            [path, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise CannotLook(f"{program}: no answer within {TIMEOUT:g} s") from None
    if done.returncode == 1 and absent:
        return []
    if done.returncode != 0:
        raise CannotLook(f"{program}: exit {done.returncode}: {done.stderr.strip()[:300]}")
    return done.stdout.splitlines()
