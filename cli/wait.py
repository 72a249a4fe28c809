"""`--wait`: returns when every cell that can be reached enforces a change.

The server says how far it has come, as server-sent events. A stream that breaks off is taken up again until the time is
over: the server may be restarting just then.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_exponential

from cli import terminal
from cli.arguments import Parser
from cli.client import Client
from cli.errors import Failed, Refused, WrongUsage
from cli.sse import Ended, following, passing

UNREACHABLE = 3
"""Exit code: all cells that can be reached enforce the change, others could not be reached."""
TOO_LATE = 4
"""Exit code: the time is over, and there are cells that do not enforce it yet."""
TIMEOUT = 120.0
MAX_NAMED = 5

EXIT_CODES = f"exit codes with --wait: {UNREACHABLE} some cells could not be reached, {TOO_LATE} not in time"

log = logging.getLogger(__name__)


def add_options(parser: Parser) -> None:
    """`--wait` and `--timeout`; `requested` tells whether they were given."""
    group = parser.add_argument_group("waiting", EXIT_CODES)
    group.add_argument("--wait", action="store_true", help="return when all live cells enforce the change")
    group.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help=f"how long to wait at most [{TIMEOUT:g}]; implies --wait"
    )


def requested(arguments: argparse.Namespace) -> bool:
    return bool(arguments.wait or arguments.timeout is not None)


def after(client: Client, arguments: argparse.Namespace, revision: int | None) -> int:
    """The exit code after waiting for this revision (None: the latest), if that was asked for. Raises Failed."""
    if not requested(arguments):
        return 0
    timeout = TIMEOUT if arguments.timeout is None else arguments.timeout
    status = until_realised(client, revision, timeout)
    quiet = getattr(arguments, "output", "table") != "table"
    say = _to_stderr if quiet else terminal.say
    unreachable = _names(status["unreachable"])
    if not status["realised"]:
        _to_stderr(f"Not enforced everywhere within {timeout:g} s: {_state(status)}. See `silkbus status`.")
        return TOO_LATE
    say(f"Revision {status['revision']} is enforced on {_cells(status['enforcing']['count'])}.")
    if status["unreachable"]["count"]:
        _to_stderr(
            f"Unreachable, so that nobody knows what they enforce: {unreachable}. They take the change up when they are"
            " back; if they are gone for good, release their leases."
        )
        return UNREACHABLE
    return 0


def until_realised(client: Client, revision: int | None, timeout: float) -> Any:
    """The last status of this revision, when it is realised or the time is over. Raises Failed."""
    deadline = time.monotonic() + timeout
    seen: Any = None

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("no news of the cells (%s), asking again", error)

    retrying = Retrying(
        retry=retry_if_exception(passing),
        stop=stop_before_delay(max(0.0, timeout)),
        wait=wait_exponential(0.2, max=3),
        before_sleep=say,
        reraise=True,
    )
    path = "/status/follow" if revision is None else f"/status/follow?revision={revision}"
    with _progress() as show:

        def follow() -> None:
            nonlocal seen
            # Something is heard every 15 s; the time must be kept in between, too.
            silence = max(0.1, min(45.0, deadline - time.monotonic()))
            with following(client, path, silence=silence) as events:
                for event in events:
                    if event.data is not None:
                        seen = event.data
                        show(_state(seen))
                    if event.kind == "realised" or time.monotonic() >= deadline:
                        return

        try:
            retrying(follow)
        except Refused:
            raise
        except (Ended, Failed) as error:
            if seen is None:
                text = f"{client.server.url} said nothing of the cells within {timeout:g} s: {error}"
                raise Failed(text) from None
    return seen


def _state(status: Any) -> str:
    """How far it has come, in words."""
    if not status["bus_connected"]:
        return "the policy server is not connected to the bus, and hears no cell"
    if not status["leases_known"]:
        return "the Silk controller does not say which cells there are"
    enforcing, behind = status["enforcing"]["count"], status["behind"]["count"]
    text = f"enforced on {enforcing} of {_cells(enforcing + behind)}"
    if behind:
        text += f", waiting for {_names(status['behind'])}"
    if status["unreachable"]["count"]:
        text += f"; unreachable: {_names(status['unreachable'])}"
    return text


def _names(group: Any) -> str:
    """`cell-1, cell-2 (problem) and 3 more`; the number alone for those who may not know the names."""
    if "cells" not in group:
        return _cells(group["count"])
    named = []
    for cell in group["cells"][:MAX_NAMED]:
        problem = cell.get("problem")
        named.append(f"{cell['cell']} ({problem})" if problem else cell["cell"])
    more = group["count"] - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _cells(number: int) -> str:
    return f"{number} cell{'' if number == 1 else 's'}"


@contextmanager
def _progress() -> Iterator[Any]:
    """Shows a line on a terminal, each over the last; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    try:
        yield lambda text: (sys.stderr.write(f"\r\x1b[K{text}…"), sys.stderr.flush())
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _to_stderr(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text + "\n")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise WrongUsage(f"--timeout must be a number of seconds, up to a day, not {text!r}")
    return value
