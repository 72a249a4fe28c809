"""What commands print: the cf CLI's texts, with its colours on a terminal and plain elsewhere."""

import os
import sys
from collections.abc import Callable, Sequence

from cli.errors import Failed, WrongUsage

_RESET = "\x1b[0m"
_BOLD = "\x1b[1m"
_CYAN = "\x1b[36;1m"
_GREEN = "\x1b[32;1m"
_RED = "\x1b[31;1m"


def _coloured(text: str, colour: str) -> str:
    """Coloured on a terminal that has colours and whose user wants them (https://no-color.org)."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"{colour}{text}{_RESET}" if wanted else text


def name(text: str) -> str:
    """The name of an app, org, space or user in a sentence."""
    return _coloured(text, _CYAN)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def ok() -> None:
    say(_coloured("OK", _GREEN) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns padded to the longest cell and three blanks; the last is not padded."""
    widths = [max(len(cell) for cell in column) + 3 for column in zip(header, *rows, strict=True)]
    for index, row in enumerate((header, *rows)):
        paint = _BOLD if index == 0 else ""
        cells = [
            (_coloured(cell, paint) if paint else cell) + " " * (width - len(cell))
            for cell, width in zip(row[:-1], widths[:-1], strict=True)
        ]
        say("".join(cells) + (_coloured(row[-1], paint) if paint else row[-1]))


def guarded(command: Callable[[], int | None], usage: Callable[[], str], *, failed: int = 1) -> int:
    """Run a command; its exit code: its own, `failed` when it failed, 2 when its command line was wrong."""
    try:
        return command() or 0
    except Failed as error:
        code, text = failed, str(error)
    except WrongUsage as error:
        code, text = 2, f"Incorrect Usage: {error}\n\n{usage()}"
    sys.stdout.flush()
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()
    say(_coloured("FAILED", _RED))
    return code
