"""What commands print: the cf CLI's texts, with its colours on a terminal and plain elsewhere."""

import os
import sys
from collections.abc import Callable, Sequence

from cli.errors import Failed, WrongUsage

RESET = "\x1b[0m"
BOLD = "\x1b[1m"
CYAN = "\x1b[36;1m"
GREEN = "\x1b[32;1m"
RED = "\x1b[31;1m"


def coloured(text: str, colour: str) -> str:
    """Coloured, if that is wanted."""
    return f"{colour}{text}{RESET}" if colours() else text


def colours() -> bool:
    """Whether output goes to a terminal that has colours and whose user wants them (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def name(text: str) -> str:
    """The name of an app, org, space or user in a sentence."""
    return coloured(text, CYAN)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def ok() -> None:
    say(coloured("OK", GREEN) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns padded to the longest cell and three blanks; the last is not padded."""
    widths = [max(len(cell) for cell in column) + 3 for column in zip(header, *rows, strict=True)]
    for index, row in enumerate((header, *rows)):
        paint = BOLD if index == 0 else ""
        cells = [
            (coloured(cell, paint) if paint else cell) + " " * (width - len(cell))
            for cell, width in zip(row[:-1], widths[:-1], strict=True)
        ]
        say("".join(cells) + (coloured(row[-1], paint) if paint else row[-1]))


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
    say(coloured("FAILED", RED))
    return code
