"""The driver of packet filter tables: makes chains of ours equal to what is wanted, and touches nothing else.

It keeps a picture of what the kernel holds of ours: chain -> hashes of its rules. The picture is read at start and
whenever it is in doubt; an apply is the difference to it, one `iptables-restore --noflush` with one transaction a
table, in which each changed chain is flushed and refilled (no packet is lost by that, kernel.md 4). On nf_tables the
kernel numbers the generations of its rules: while the number is the one our last write left, the picture is true.
"""

import logging
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bus.log import about
from services.enforcer.in_process import InProcess
from services.enforcer.rules import PREFIX, TABLES, ChainId, Chains
from services.enforcer.settings import Kind

log = logging.getLogger(__name__)

LOCK_WAIT = 5
"""Seconds that iptables may wait for the xtables lock (legacy only)."""
TIMEOUT = 60.0
"""Seconds that one run of iptables may take. 139 000 lines took 1.7 (kernel.md 4)."""

Family = Literal["ip", "ip6"]

_HASH = re.compile(r' --comment "?sb:([0-9a-f]{12})"?(?: |$)')
_FOREIGN = ""
_RESOURCE_PROBLEM = 4
"""The exit code of iptables when it got no lock, or the kernel had no time or memory (xtables.h)."""


class IptablesError(Exception):
    """iptables did not do as told. The text has its words, and the line it refused.

    `refusal`: it, or the kernel, did not take a rule; `rule` is its chain and hash, where it says which.
    """

    def __init__(self, text: str, *, refusal: bool = False, rule: tuple[ChainId, str] | None = None) -> None:
        super().__init__(text)
        self.refusal = refusal
        self.rule = rule


@dataclass(slots=True)
class Picture:
    """What the kernel holds. A rule without a hash of ours is foreign: ''."""

    own: dict[ChainId, tuple[str, ...]] = field(default_factory=dict)
    builtin: dict[ChainId, tuple[str, ...]] = field(default_factory=dict)
    """Built-in chains: the hashes, in order, foreign ones too."""
    jumps: dict[ChainId, list[str]] = field(default_factory=dict)
    """Our rules in built-in chains, as printed after `-A`: what `-D` understands."""

    @property
    def rules(self) -> int:
        return sum(map(len, self.own.values())) + sum(map(len, self.jumps.values()))


def parse(table: str, saved: str, picture: Picture) -> None:
    """Add what `iptables-save -t table` printed to a picture: names of chains and hashes, nothing else."""
    own: dict[str, list[str]] = {}
    builtin: dict[str, list[str]] = {}
    for line in saved.splitlines():
        if line.startswith(":"):
            name = line[1 : line.index(" ")]
            if name.startswith(PREFIX):
                own[name] = []
            elif name.isupper():
                builtin[name] = []
        elif line.startswith("-A "):
            name = line[3 : line.index(" ", 3)]
            found = _HASH.search(line)
            mark = found[1] if found else _FOREIGN
            if name in own:
                own[name].append(mark)
            elif name in builtin:
                builtin[name].append(mark)
                if found:
                    picture.jumps.setdefault(ChainId(table, name), []).append(line[3:])
    picture.own |= {ChainId(table, name): tuple(hashes) for name, hashes in own.items()}
    picture.builtin |= {ChainId(table, name): tuple(hashes) for name, hashes in builtin.items()}


@dataclass(frozen=True, slots=True)
class Edit:
    """What to write: lines of iptables-restore for each table, and the chains that they make so."""

    lines: Mapping[str, list[str]]
    chains: Chains

    def __bool__(self) -> bool:
        return bool(self.chains)

    @property
    def text(self) -> str:
        return "".join(f"*{table}\n" + "\n".join(self.lines[table]) + "\nCOMMIT\n" for table in self.lines)


def difference(picture: Picture, wanted: Chains) -> Edit:
    """How to make the chains `wanted` so, given what the kernel holds. Chains not named stay as they are."""
    heads: dict[str, list[str]] = {}
    bodies: dict[str, list[str]] = {}
    changed = {}
    for chain, rules in wanted.items():
        hashes = tuple(rule.hash for rule in rules)
        if chain.ours:
            if picture.own.get(chain) == hashes:
                continue
            heads.setdefault(chain.table, []).append(f":{chain.name} - [0:0]")
            body = [f"-A {chain.name} {rule.specification}" for rule in rules]
        else:
            held = picture.builtin.get(chain, ())
            if held[: len(hashes)] == hashes and len(picture.jumps.get(chain, ())) == len(hashes):
                continue
            body = [f"-D {jump}" for jump in picture.jumps.get(chain, ())]
            body += [f"-I {chain.name} {n} {rule.specification}" for n, rule in enumerate(rules, 1)]
        bodies.setdefault(chain.table, []).extend(body)
        changed[chain] = rules
    order = [table for table in TABLES if table in heads or table in bodies]
    return Edit({table: heads.get(table, []) + bodies.get(table, []) for table in order}, changed)


class Iptables:
    """One family's tables, of one kind."""

    def __init__(self, kind: Kind, family: Family = "ip") -> None:
        self.kind = kind
        self.family = family
        self.picture = Picture()
        self._in_process = InProcess() if (kind, family) == ("legacy", "ip") else None

    def _run(self, program: str, *arguments: str, text: str | None = None) -> str:
        command = f"{self.family}tables-{self.kind}-{program}"
        path = shutil.which(command)
        if path is None:
            raise IptablesError(
                f"{command}: not found; install iptables 1.8 or later, or set `iptables` to the other kind"
            )
        try:
            done = subprocess.run(  # noqa: S603 (our own words, no shell)
                [path, *arguments], input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise IptablesError(f"{command}: no answer within {TIMEOUT:g} s") from None
        if done.returncode != 0:
            raise _error(command, done.returncode, done.stderr.strip(), (text or "").splitlines())
        return done.stdout

    def read(self, tables: Iterable[str] = TABLES) -> None:
        """Look at the kernel anew. Raises IptablesError."""
        picture = Picture()
        for table in tables:
            parse(table, self._run("save", "-t", table), picture)
        self.picture = picture

    def write(self, edit: Edit) -> None:
        """Make an edit of this picture, and note it there. Raises IptablesError; then the picture must be read."""
        if self._in_process is None or not self._in_process.write(self.picture.own, edit.chains):
            self._run("restore", "--noflush", "-w", str(LOCK_WAIT), text=edit.text)
        for chain, rules in edit.chains.items():
            hashes = tuple(rule.hash for rule in rules)
            if chain.ours:
                self.picture.own[chain] = hashes
            else:
                foreign = tuple(mark for mark in self.picture.builtin.get(chain, ()) if mark == _FOREIGN)
                self.picture.builtin[chain] = hashes + foreign
                self.picture.jumps[chain] = [f"{chain.name} {rule.specification}" for rule in rules]

    def delete(self, chains: Collection[ChainId]) -> int:
        """Delete chains of ours that nothing refers to; returns how many transactions that took.

        One that cannot be deleted (somebody else's rule jumps to it) is emptied and left, and said so.
        """
        chains = [chain for chain in chains if chain in self.picture.own]
        if not chains:
            return 0
        try:
            return self._delete(chains)
        except IptablesError as error:
            if len(chains) == 1:
                log.warning("chain not deleted", extra=about(chain="/".join(chains[0]), error=str(error)))
                return 0
        # One at a time, so that one that is held does not keep the others.
        return sum(self.delete([chain]) for chain in chains)

    def _delete(self, chains: Collection[ChainId]) -> int:
        lines: dict[str, list[str]] = {}
        for table in TABLES:
            names = [chain.name for chain in chains if chain.table == table]
            if names:
                lines[table] = [f":{name} - [0:0]" for name in names] + [f"-X {name}" for name in names]
        self._run("restore", "--noflush", "-w", str(LOCK_WAIT), text=Edit(lines, {}).text)
        for chain in chains:
            del self.picture.own[chain]
        return len(lines)

    def erase(self) -> int:
        """Take everything of ours out of these tables: this kind is not the one in use."""
        jumps = {chain: lines for chain, lines in self.picture.jumps.items() if lines}
        for chain, lines in jumps.items():
            deletions = {chain.table: [f"-D {line}" for line in lines]}
            self._run("restore", "--noflush", "-w", str(LOCK_WAIT), text=Edit(deletions, {}).text)
        removed = len(jumps) + len(self.picture.own)
        self.picture.jumps.clear()
        self.delete(tuple(self.picture.own))
        return removed


def _error(command: str, code: int, words: str, lines: list[str]) -> IptablesError:
    """What went wrong, and with which line. A code of 4 is about resources (the lock), not about what was asked."""
    named = re.search(r"line:? (\d+)", words)
    number = int(named[1]) if named else 0
    line = lines[number - 1] if 0 < number <= len(lines) else ""
    found = _HASH.search(line)
    rule = None
    if found and line.startswith("-A "):
        table = next(above[1:] for above in reversed(lines[:number]) if above.startswith("*"))
        rule = ChainId(table, line.split()[1]), found[1]
    culprit = f": {line}" if line else ""
    # What the kernel refuses of nf_tables has that code as well, but then it is said of which rule.
    refusal = code != _RESOURCE_PROBLEM or rule is not None
    return IptablesError(f"{command}: exit {code}: {words}{culprit}", refusal=refusal, rule=rule)


def loaded(kind: Kind, family: Family = "ip") -> tuple[str, ...]:
    """The tables of a kind that can be read without making them exist: reading a legacy table creates it."""
    if shutil.which(f"{family}tables-{kind}-save") is None:
        return ()
    if kind == "nft":
        return TABLES
    try:
        names = Path(f"/proc/thread-self/net/{family}_tables_names").read_text().split()
    except OSError:
        return ()
    return tuple(table for table in TABLES if table in names)


def detect() -> Kind:
    """The kind this host uses: what `iptables` is, unless only the other kind's filter table holds others' rules.

    Rules of both kinds are in force at once, in an order nobody can choose, so ours belong where the host's are.
    """
    try:
        version = subprocess.run(
            ["iptables", "-V"],  # noqa: S607 (the host's own choice is the question)
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        ).stdout
    except FileNotFoundError:
        raise IptablesError("iptables: not found; install iptables 1.8 or later") from None
    host: Kind = "nft" if "nf_tables" in version else "legacy"
    other: Kind = "legacy" if host == "nft" else "nft"
    return other if _foreign_rules(other) and not _foreign_rules(host) else host


def _foreign_rules(kind: Kind) -> bool:
    if "filter" not in loaded(kind):
        return False
    saved = Iptables(kind)._run("save", "-t", "filter")
    return any(
        line.startswith("-A ") and not line.startswith(f"-A {PREFIX}") and not _HASH.search(line)
        for line in saved.splitlines()
    )
