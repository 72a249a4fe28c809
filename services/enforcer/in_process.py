"""Changes of a few rules of a legacy table, made here by python-iptables rather than by a run of iptables-restore.

The kernel takes a legacy table only as a whole, whoever changes it; but libiptc in this process saves the other program
and its reading of a whole chain's rules, and leaves the counters of the rules that stay: 36 ms for 56 at 10 000 rules.
It is an optional package (it must be compiled). Whatever it cannot do, or fails at, iptables-restore does: a change is
one system call, so what failed has changed nothing.
"""

import ctypes
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bus.log import about
from services.enforcer.rules import ChainId, Chains, Rule
from services.enforcer.xtables_lock import Locked, xtables_lock

log = logging.getLogger(__name__)

MAX_CHANGES = 8
"""Rules to add or take out, and chains to make. Each costs 0.5 ms, where iptables-restore needs 0.01 (kernel.md 4)."""
LOCK_WAIT = 0.5
"""Seconds to wait for the xtables lock here; iptables-restore, which queues for it, then waits longer."""
_MATCHES = frozenset({"tcp", "udp", "mark", "comment"})
"""What the rules of policies are made of. Others have options that python-iptables cannot always set."""
_CHAINS = ("sb-a-", "sb-g-")
"""Chains of which every rule is such a one: taking others apart has made libiptc read memory that was not its own."""
_FIELDS = {"-p": "protocol", "-s": "src", "-d": "dst"}


class Change(NamedTuple):
    """In this chain: from the rule at `position` on, as many as there are in `removed` give way to `added`.

    `before` are the hashes that the chain has; None if there is no such chain yet.
    """

    chain: ChainId
    before: tuple[str, ...] | None
    position: int
    removed: tuple[str, ...]
    added: tuple[Rule, ...]


def changes(held: Mapping[ChainId, tuple[str, ...]], wanted: Chains) -> list[Change] | None:
    """What to change in chains of ours, given the hashes that they hold; None if that is too much for here."""
    found = []
    for chain, rules in wanted.items():
        if not chain.name.startswith(_CHAINS):
            return None
        known = held.get(chain)
        before, after = known or (), tuple(rule.hash for rule in rules)
        start = _common(before, after)
        end = _common(before[start:][::-1], after[start:][::-1])
        found.append(Change(chain, known, start, before[start : len(before) - end], rules[start : len(after) - end]))
    few = sum(len(c.removed) + len(c.added) + (c.before is None) for c in found) <= MAX_CHANGES
    return found if few and len({chain.table for chain in wanted}) == 1 else None


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many items both begin with."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


class InProcess:
    """For IPv4, in the thread (and its network namespace) that calls it."""

    def __init__(self) -> None:
        try:
            import iptc
        except Exception as error:  # noqa: BLE001 (not installed, or its libraries are not: it says so in many ways)
            log.info("python-iptables not usable; iptables-restore does all", extra=about(error=str(error)))
            iptc = None
        self._iptc = iptc

    def write(self, held: Mapping[ChainId, tuple[str, ...]], wanted: Chains) -> bool:
        """Make these chains of one table so; False if that is not for here, or failed: then nothing has changed."""
        if self._iptc is None or not (todo := changes(held, wanted)):
            return False
        try:
            with xtables_lock(LOCK_WAIT):
                self._commit(todo)
        except (Locked, Unfit, self._iptc.IPTCError, self._iptc.xtables.XTablesError) as error:
            log.debug("left to iptables-restore", extra=about(reason=str(error)))
            return False
        except Exception as error:  # noqa: BLE001 (a binding of C may raise anything, and must not end the enforcer)
            log.warning("python-iptables failed; left to iptables-restore", extra=about(error=repr(error)))
            return False
        return True

    def _commit(self, todo: list[Change]) -> None:
        table = self._iptc.Table(todo[0].chain.table, autocommit=False)
        try:
            table.refresh()
            for change in todo:
                if change.before is None:
                    table.create_chain(change.chain.name)
            for change in todo:
                chain = self._iptc.Chain(table, change.chain.name)
                self._take_out(table, chain, change)
                for position, rule in enumerate(change.added, change.position):
                    chain.insert_rule(self._entry(rule), position)
            table.commit()
        finally:
            table.close()

    def _take_out(self, table: Any, chain: Any, change: Change) -> None:
        held = list(_rules(table, chain.name))
        if len(held) != len(change.before or ()):
            raise Unfit(f"{chain.name} has {len(held)} rules, not {len(change.before or ())}")
        for position, expected in enumerate(change.removed, change.position):
            # Known by its bytes, before anything takes it apart: it may be somebody else's by now.
            if f"sb:{expected}\0".encode() not in _bytes(held[position]):
                raise Unfit(f"{chain.name}: rule {position + 1} is another")
            chain.delete_rule(table.create_rule(held[position], chain))

    def _entry(self, rule: Rule) -> Any:
        """The rule as libiptc takes it. Raises Unfit for what is not as the rules of policies are.

        To be called while the table is open: a target is looked up there, in closed memory too.
        """
        made = self._iptc.Rule()
        match: Any = None
        words = iter(rule.specification.split())
        for word in words:
            value = next(words, "")
            if word in _FIELDS:
                setattr(made, _FIELDS[word], value)
            elif word == "-m" and value in _MATCHES:
                match = made.create_match(value)
            elif word.startswith("--") and match is not None:
                match.set_parameter(word[2:], value)
            elif word == "-j" and next(words, None) is None:
                made.target = self._iptc.Target(made, value)
            else:
                raise Unfit(f"{word} {value}")
        return made


class Unfit(Exception):
    """Not for here."""


def _bytes(entry: Any) -> bytes:
    """An entry (struct ipt_entry) as the kernel has it."""
    return ctypes.string_at(ctypes.addressof(entry), entry.next_offset)


def _rules(table: Any, chain: str) -> Iterator[Any]:
    entry = table.first_rule(chain)
    while entry:
        yield entry
        entry = table.next_rule(entry)
