"""Writing rules so that one the kernel refuses does not keep out the others.

What comes from outside is checked long before it is a rule; still a kernel may lack a match, or have a limit nobody
knew. Then the transaction fails as a whole. The rule at fault is found, left out and said, and the rest is written: by
the line that the program names, or, where it names none (legacy tables fail at COMMIT), by halves.

Only what grants is left out, so that a fault never opens anything: single rules of chains that only accept, and whole
chains where a rule may refuse. What is left out is tried again now and then, and when it is no longer the same rule.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from prometheus_client import Gauge

from bus.log import about
from services.enforcer.iptables import Edit, Iptables, IptablesError, Picture, difference
from services.enforcer.rules import ChainId, Chains, Rules

log = logging.getLogger(__name__)

RETRY = 60.0
"""Seconds until what was refused is tried again."""
MAX_NAMED = 16
"""Refusals that are taken one by one, by the lines named, before the rest is halved."""

REFUSED = Gauge(
    "silkbus_enforcer_refused_rules", "Rules, or chains of them, that the kernel refuses and that are left out"
)

_GRANTING = ("sb-a-", "sb-g-", "sb-p-", "sb-s-")
"""Chains of which each rule lets something through: of apps, of containers by address, of ports, of groups."""
_WHOLE = ("sb-e-", "sb-f-")
"""Chains in which a rule may also refuse: without one of them more would pass."""


class Part(NamedTuple):
    """What can be left out: a rule by its hash, or a whole chain, whose hash is then empty."""

    chain: ChainId
    hash: str


class Isolation:
    """Writes one family's tables. `reread` is called when the picture of them is in doubt, `wrote` with the number of
    transactions that were made."""

    def __init__(self, tables: Iptables, reread: Callable[[], None], wrote: Callable[[int], None]) -> None:
        self._tables = tables
        self._reread = reread
        self._wrote = wrote
        self._tried_at = 0.0
        self.refused: dict[Part, str] = {}
        """What is left out, with the kernel's or the program's word for it."""

    def retry(self) -> None:
        """Try again what was left out, if that was some time ago; to be called before all chains are written."""
        if self.refused and time.monotonic() - self._tried_at > RETRY:
            self.refused.clear()
            REFUSED.set(0)

    def edit(self, chains: Chains) -> Edit:
        """How to make these chains so, without what is left out."""
        return difference(self._tables.picture, _without(chains, self.refused.keys()))

    def write(self, edit: Edit, chains: Chains) -> int:
        """Make an edit for these chains, as far as the kernel takes it; how many chains that changed.

        Raises IptablesError when it is not a rule's fault, or that of a rule that nobody may miss.
        """
        try:
            return self._write(edit)
        except IptablesError as error:
            if not error.refusal or not any(_parts(chains)):
                raise
            self._reread()
            changed = self._isolate(chains, error)
        self._tried_at = time.monotonic()
        REFUSED.set(len(self.refused))
        return changed

    def _write(self, edit: Edit) -> int:
        if edit:
            self._tables.write(edit)
            self._wrote(len(edit.lines))
        return len(edit.chains)

    def _isolate(self, chains: Chains, error: IptablesError) -> int:
        for _ in range(MAX_NAMED):
            part = _named(error, chains)
            if part is None or part in self.refused:
                break
            self._refuse(part, error)
            try:
                return self._write(self.edit(chains))
            except IptablesError as another:
                if not another.refusal:
                    raise
                error = another
                self._reread()
        suspects = list(_parts(self.edit(chains).chains))
        pending = set(suspects)
        changed = self._write(self._without_any(chains, pending))
        return changed + self._settle(chains, suspects, pending)

    def _without_any(self, chains: Chains, suspects: set[Part]) -> Edit:
        """All that is wanted but the suspects. If that is refused, too, it is none of them: so chains of which nothing
        else is to change are written again."""
        left = _without(chains, {*self.refused, *suspects})
        edit = difference(self._tables.picture, left)
        if edit:
            return edit
        concerned = {part.chain for part in suspects}
        return difference(Picture(), {chain: rules for chain, rules in left.items() if chain in concerned})

    def _edit_but(self, chains: Chains, pending: set[Part]) -> Edit:
        return difference(self._tables.picture, _without(chains, {*self.refused, *pending}))

    def _settle(self, chains: Chains, parts: list[Part], pending: set[Part]) -> int:
        """Write these parts, too, of those that are not written yet; halved while they are refused."""
        if not parts:
            return 0
        pending -= set(parts)
        try:
            return self._write(self._edit_but(chains, pending))
        except IptablesError as error:
            if not error.refusal:
                raise
            self._reread()
            failure = error
        pending |= set(parts)
        if len(parts) == 1:
            self._refuse(parts[0], failure)
            return 0
        middle = len(parts) // 2
        return self._settle(chains, parts[:middle], pending) + self._settle(chains, parts[middle:], pending)

    def _refuse(self, part: Part, error: IptablesError) -> None:
        self.refused[part] = str(error)
        log.error(
            "the kernel refuses a rule; it is left out, and the others are not",
            extra=about(chain="/".join(part.chain), rule=part.hash or "all of the chain", error=str(error)),
        )


def _parts(chains: Chains) -> Iterator[Part]:
    for chain, rules in chains.items():
        if chain.name.startswith(_GRANTING):
            yield from (Part(chain, rule.hash) for rule in rules)
        elif chain.name.startswith(_WHOLE) and rules:
            yield Part(chain, "")


def _without(chains: Chains, parts: Collection[Part]) -> Chains:
    if not parts:
        return chains
    concerned = {part.chain for part in parts}

    def left(chain: ChainId, rules: Rules) -> Rules:
        if Part(chain, "") in parts:
            return ()
        return tuple(rule for rule in rules if Part(chain, rule.hash) not in parts)

    return {chain: left(chain, rules) if chain in concerned else rules for chain, rules in chains.items()}


def _named(error: IptablesError, chains: Chains) -> Part | None:
    """What the program says it was, if that can be left out."""
    if error.rule is None:
        return None
    chain, found = error.rule
    return next((part for part in _parts({chain: chains.get(chain, ())}) if part.hash in ("", found)), None)
