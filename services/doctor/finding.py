"""What an examination of a cell comes to: findings, each with what to do about it."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

log = logging.getLogger(__name__)


class Level(StrEnum):
    """`wrong` breaks something, or will; `warning` may; `unknown` could not be looked at."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` is what was looked at, `what` what was found, `remedy` what to do; empty where there is nothing to do."""

    check: str
    level: Level
    what: str
    remedy: str = ""

    def encode(self) -> dict[str, Any]:
        return {**asdict(self), "level": str(self.level)}


def fine(check: str, what: str) -> Finding:
    return Finding(check, Level.OK, what)


def warning(check: str, what: str, remedy: str) -> Finding:
    return Finding(check, Level.WARNING, what, remedy)


def wrong(check: str, what: str, remedy: str) -> Finding:
    return Finding(check, Level.WRONG, what, remedy)


def unknown(check: str, what: str, remedy: str = "") -> Finding:
    return Finding(check, Level.UNKNOWN, what, remedy)


def guarded(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of one look; one that fails says so, and does not keep the others from being made."""
    try:
        yield from look()
    except Exception as error:  # a sick cell may fail in any way, which is a finding, too
        log.debug("check failed", exc_info=True)
        yield unknown(
            check,
            f"could not be looked at: {type(error).__name__}: {error}",
            "run as root on the cell; see with --verbose",
        )
