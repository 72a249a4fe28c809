"""Notices, cheaply, that somebody else changed the tables since we last knew them: asked once a second, when idle too.

nf_tables numbers the generations of its rules, and each transaction of ours is one: more than that were others'.
Legacy tables have no such number. There it is the count of entries, which our own picture foretells, that is compared
each second, and a digest of all entries now and then: each second for a small table, for a large one as often as takes
no more than a hundredth of the time. What keeps the count and comes in the moment between a write of ours and the
digest after it is left to the full look once a minute.
"""

import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Protocol

from bus.log import about
from services.enforcer.generation import nft_generation
from services.enforcer.iptables import Family, Picture
from services.enforcer.legacy import table_digest, table_info

log = logging.getLogger(__name__)

DIGEST_SHARE = 0.01
"""Share of the time that digests of legacy tables may take."""

Table = tuple[Family, str]
Pictures = Mapping[Table, Picture]
"""Each table, with the picture that it is part of."""


class Watch(Protocol):
    """How a driver is told of drift. All in the kernel thread."""

    def begin(self, tables: Collection[Table]) -> None:
        """These tables are about to be read."""

    def noted(self, pictures: Pictures) -> None:
        """They have been read, and are as pictured, unless somebody wrote since `begin`."""

    def wrote(self, transactions: int) -> None:
        """We wrote so many transactions, and the pictures say what."""

    def distrust(self) -> None:
        """What was noted counts for nothing any more."""

    def settle(self, tables: Collection[Table]) -> None:
        """We wrote, and now have a moment."""

    def doubtful(self, pictures: Pictures) -> bool:
        """Whether the tables may be other than pictured."""


class GenerationWatch:
    """By the generation of nf_tables. Where the kernel does not tell it, every look is a doubt."""

    def __init__(self) -> None:
        self._before: int | None = None
        self._noted: int | None = None

    def begin(self, tables: Collection[Table]) -> None:  # noqa: ARG002
        self._before = nft_generation()

    def noted(self, pictures: Pictures) -> None:  # noqa: ARG002
        # A change while we read leaves the number higher than the one noted: the next look finds it.
        self._noted = self._before

    def wrote(self, transactions: int) -> None:
        if self._noted is not None:
            self._noted += transactions

    def distrust(self) -> None:
        self._noted = None

    def settle(self, tables: Collection[Table]) -> None:
        pass

    def doubtful(self, pictures: Pictures) -> bool:  # noqa: ARG002
        return self._noted is None or nft_generation() != self._noted


class CountingWatch:
    """By counts and digests of legacy tables."""

    def __init__(self) -> None:
        self._foreign: dict[Table, int] | None = None
        """Entries that are not ours, which only others change."""
        self._before: dict[Table, int] = {}
        self._digests: dict[Table, bytes] = {}
        self._digest_due = 0.0

    def begin(self, tables: Collection[Table]) -> None:
        self._foreign = None
        self._digests.clear()
        try:
            self._before = {table: table_info(*table).entries for table in tables}
            self._digests = {table: table_digest(*table) for table in tables}
        except OSError as error:
            log.debug("legacy tables not counted", extra=about(error=str(error)))
            self._before = {}

    def noted(self, pictures: Pictures) -> None:
        if self._before.keys() == pictures.keys():
            self._foreign = {table: self._before[table] - _ours(picture, table) for table, picture in pictures.items()}

    def wrote(self, transactions: int) -> None:
        if transactions:
            self._digests.clear()

    def distrust(self) -> None:
        self._foreign = None

    def settle(self, tables: Collection[Table]) -> None:
        if not self._digests and self._foreign is not None:
            with suppress(OSError):
                self._digests = {table: table_digest(*table) for table in tables}

    def doubtful(self, pictures: Pictures) -> bool:
        if self._foreign is not None and not self._as_noted(self._foreign, pictures):
            self._foreign = None
        return self._foreign is None

    def _as_noted(self, foreign: Mapping[Table, int], pictures: Pictures) -> bool:
        try:
            counted = all(
                table_info(*table).entries == foreign[table] + _ours(picture, table)
                for table, picture in pictures.items()
            )
            return counted and not self._other_digest(pictures)
        except OSError:  # a table that is gone, or that changes while it is read
            return False

    def _other_digest(self, tables: Collection[Table]) -> bool:
        began = time.monotonic()
        if began < self._digest_due:
            return False
        digests = {table: table_digest(*table) for table in tables}
        ended = time.monotonic()
        self._digest_due = ended + (ended - began) / DIGEST_SHARE
        if self._digests and digests != self._digests:
            return True
        self._digests = digests
        return False


def _ours(picture: Picture, table: Table) -> int:
    """How many entries of a legacy table are ours: a chain has one at its head and one at its end."""
    name = table[1]
    chains = sum(len(rules) + 2 for chain, rules in picture.own.items() if chain.table == name)
    return chains + sum(len(jumps) for chain, jumps in picture.jumps.items() if chain.table == name)
