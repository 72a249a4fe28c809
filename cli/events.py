"""`silkbus events`: what happens to policies and leases, as it happens.

No event of a policy is missed: what was committed between the reading of the last changes and the beginning of the
stream is read from the change log, and a stream that broke off is taken up where it was.
"""

import argparse
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from cli import arguments as command_line
from cli import output, terminal
from cli.apps import App
from cli.client import Policy
from cli.history import fetch, limit, local, sentence
from cli.policies import as_value
from cli.session import Session
from cli.sse import Event, following, passing

LIMIT = 10
ATTEMPTS = 20
"""How often in a row a stream that says nothing is taken up again: for some two minutes."""
MAX_NAMES = 10_000

log = logging.getLogger(__name__)


def show(argv: list[str]) -> int:
    """`silkbus events`; the exit code."""
    parser = command_line.api_parser(
        "events",
        "Show what happened to policies, and go on with policies and leases as things happen. Needs network.admin.",
        [
            ("", f"the last {LIMIT} changes"),
            ("--follow", "these, and all that come; end it with Ctrl-C"),
            ("--follow --limit 0 -o json | jq .", "only those that come, one JSON object a line"),
        ],
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on, until interrupted")
    parser.add_argument("--limit", type=_limit, default=LIMIT, metavar="N", help=f"how many past changes [{LIMIT}]")
    command_line.add_output(parser)

    def run(arguments: argparse.Namespace) -> None:
        session = Session(arguments)
        printer = _Printer(session, arguments.output)
        if arguments.follow:
            stream = _Stream(session, printer)
            stream.begin(arguments.limit)
            stream.follow()
        else:
            for event in _past(session, arguments.limit):
                printer.show(event)

    return command_line.run(parser, argv, run)


def _past(session: Session, most: int, *, after: int | None = None) -> list[Event]:
    """The events of the last changes, the oldest first."""
    events = []
    changes = list(fetch(session.client, {"after": None if after is None else str(after)}, most))
    for change in reversed(changes):
        for kind, policies in (("policy.removed", change["removed"]), ("policy.added", change["added"])):
            for policy in policies:
                data = {"source": policy.source, "destination": policy.destination}
                data["ports"] = [policy.protocol, policy.start, policy.end]
                told = {"time": change["time"], "revision": change["revision"], "user": change["user"], "data": data}
                events.append(Event(kind, told))
    return events


class _Stream:
    """The endless stream: what was shown already, and where to go on."""

    def __init__(self, session: Session, printer: "_Printer") -> None:
        self._session = session
        self._printer = printer
        self._shown = 0
        """The revision up to which all was read from the change log."""
        self._last = ""
        self._failures = 0

    def begin(self, most: int) -> None:
        """Show the last changes."""
        newest = next(iter(fetch(self._session.client, {}, 1)), None)
        self._shown = 0 if newest is None else int(newest["revision"])
        for event in _past(self._session, most):
            if event.data["revision"] <= self._shown:
                self._printer.show(event)

    def follow(self) -> None:
        """Show events for ever. Raises Failed when the server refuses, or does not come back."""

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning("the stream of events broke off (%s), taking it up again", error)

        Retrying(
            retry=retry_if_exception(passing),
            stop=lambda _: self._failures >= ATTEMPTS,
            wait=wait_exponential(0.5, max=8),
            before_sleep=say,
            reraise=True,
        )(self._once)

    def _once(self) -> None:
        self._failures += 1
        with following(self._session.client, "/events", self._last) as events:
            # The server knows where to go on from an id. Without one the stream begins with what comes now, as soon as
            # it says anything; what was committed before that is in the change log.
            caught_up = bool(self._last)
            for event in events:
                self._failures = 0
                if not caught_up:
                    self._catch_up()
                    caught_up = True
                self._take(event)

    def _catch_up(self) -> None:
        for event in _past(self._session, sys.maxsize, after=self._shown):
            self._printer.show(event)
            self._shown = max(self._shown, event.data["revision"])

    def _take(self, event: Event) -> None:
        self._last = event.number or self._last
        if event.kind == "reset":
            log.warning("the database was restored; what that undid is no event, see `silkbus history`")
            self._shown, self._last = int(event.data["revision"]), ""
        elif event.kind and not (event.kind.startswith("policy.") and event.data["revision"] <= self._shown):
            self._printer.show(event)


class _Printer:
    """Prints events one by one: a line each, or a document of YAML."""

    def __init__(self, session: Session, form: str) -> None:
        self._session = session
        self._form = form
        self._names: dict[str, App] = {}

    def show(self, event: Event) -> None:
        if self._form == "table":
            terminal.say(self._line(event))
        elif self._form == "json":
            terminal.say(json.dumps(self._value(event), ensure_ascii=False))
        else:
            terminal.say("---")
            output.structured("yaml", self._value(event))
        sys.stdout.flush()

    def _line(self, event: Event) -> str:
        when = local(event.data.get("time") or datetime.now(UTC).isoformat())
        if not event.kind.startswith("policy."):
            lease = event.data["data"]
            return f"{when}  {event.kind:16} {lease['subnet']} of {lease['cell']} ({lease['underlay']})"
        policy = _policy(event)
        colour = terminal.GREEN if event.kind == "policy.added" else terminal.RED
        by = f"  by {event.data['user']}" if event.data.get("user") else ""
        text = sentence(policy, self._apps(policy))
        return (
            f"{when}  {terminal.coloured(f'{event.kind:16}', colour)} {text}  (revision {event.data['revision']}{by})"
        )

    def _value(self, event: Event) -> dict[str, Any]:
        value = {"kind": event.kind, **event.data}
        if event.kind.startswith("policy."):
            policy = _policy(event)
            apps = self._apps(policy)
            value["policy"] = as_value(policy, apps[policy.source], apps[policy.destination])
        return value

    def _apps(self, policy: Policy) -> dict[str, App]:
        ends = {policy.source, policy.destination}
        if unknown := ends - self._names.keys():
            if len(self._names) > MAX_NAMES:
                self._names.clear()
                unknown = ends
            self._names |= self._session.apps.known(unknown)
        return {guid: self._names[guid] for guid in ends}


def _policy(event: Event) -> Policy:
    data = event.data["data"]
    protocol, start, end = data["ports"]
    return Policy(data["source"], data["destination"], protocol, start, end)


def _limit(text: str) -> int:
    return 0 if text == "0" else limit(text)
