"""`silkbus history`: who changed which policies when; the answers of `GET …/history` with names."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from cli import arguments as command_line
from cli import output, terminal
from cli.apps import App
from cli.client import Client, Policy
from cli.errors import Failed, WrongUsage
from cli.policies import as_value
from cli.session import Session

LIMIT = 20
PAGE = 1000
"""Changes in one answer at most."""
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
HEADER = ("revision", "time", "user", "change")
_AGO = re.compile(r"([0-9]{1,6})([smhdw])")


def show(argv: list[str]) -> int:
    """`silkbus history`; the exit code."""
    parser = command_line.api_parser(
        "history",
        "Show who changed which policies when, the latest first. Needs network.admin.",
        [
            ("", f"the last {LIMIT} changes"),
            ("--app frontend --since 7d", "those of the last week that concern an app"),
            ("--user jane --since 2026-11-01 --until 2026-12-01", "those of somebody, in your time zone"),
            ("--limit 1000 -o json", "for programs"),
        ],
    )
    parser.add_argument("--app", metavar="APP", help="only changes of this app's policies, as source or destination")
    parser.add_argument("--user", metavar="USER", help="only changes by this user")
    parser.add_argument(
        "--since", type=moment, metavar="TIME", help="only later ones: 2026-11-23T19:20, or 30m, 2h, 7d ago"
    )
    parser.add_argument("--until", type=moment, metavar="TIME", help="only earlier ones")
    parser.add_argument("--limit", type=limit, default=LIMIT, metavar="N", help=f"how many at most [{LIMIT}]")
    command_line.add_output(parser)

    def run(arguments: argparse.Namespace) -> None:
        session = Session(arguments)
        app = None if arguments.app is None else session.source(arguments.app).guid
        query = {"app_id": app, "user": arguments.user, "since": arguments.since, "until": arguments.until}
        changes = list(fetch(session.client, query, arguments.limit))
        apps = session.apps.known(guid for change in changes for guid in guids(change))
        if arguments.output == "table":
            terminal.table(HEADER, [row for change in changes for row in _rows(change, apps)])
        else:
            output.structured(arguments.output, [_as_value(change, apps) for change in changes])

    return command_line.run(parser, argv, run)


def fetch(client: Client, query: Mapping[str, str | None], most: int) -> Iterator[Any]:
    """Changes, the latest first, as the API has them but for policies, which are decoded. Raises Failed."""
    before: int | None = None
    while most > 0:
        given = {name: value for name, value in query.items() if value is not None}
        given |= {"limit": str(min(most, PAGE))} | ({} if before is None else {"before": str(before)})
        answer = client.get(f"/history?{urlencode(given)}")
        try:
            for change in answer["history"]:
                most -= 1
                for kind in ("added", "removed"):
                    change[kind] = [Policy.decode(item) for item in change[kind]]
                yield change
            if answer["next"] is None:
                return
            before = answer["next"]["before"]
        except (KeyError, TypeError) as error:
            raise Failed(f"{client.server.url} answered a history that is not understood: {error!r}") from None


def guids(change: Any) -> Iterator[str]:
    """The apps of a change's policies."""
    for policy in (*change["added"], *change["removed"]):
        yield policy.source
        yield policy.destination


def local(time: str) -> str:
    """A time as the API writes it, in this machine's zone, to the second."""
    return datetime.fromisoformat(time).astimezone().isoformat(sep=" ", timespec="seconds")


def sentence(policy: Policy, apps: Mapping[str, App]) -> str:
    """`acme/dev/front → acme/dev/back tcp 8080`."""
    return f"{full_name(apps[policy.source])} → {full_name(apps[policy.destination])} {policy.protocol} {policy.ports}"


def full_name(app: App) -> str:
    return "/".join(part for part in (app.org, app.space, app.name) if part)


def _rows(change: Any, apps: Mapping[str, App]) -> Iterator[Sequence[str]]:
    """One row a policy; what is common stands in the first."""
    head = (str(change["revision"]), local(change["time"]), change["user"])
    lines = [
        f"{sign} {sentence(policy, apps)}"
        for sign, kind in (("+", "added"), ("-", "removed"))
        for policy in change[kind]
    ]
    for line in lines or ["no policies"]:
        yield (*head, line)
        head = ("", "", "")


def _as_value(change: Any, apps: Mapping[str, App]) -> dict[str, Any]:
    policies = {
        kind: [as_value(policy, apps[policy.source], apps[policy.destination]) for policy in change[kind]]
        for kind in ("added", "removed")
    }
    return {**change, **policies}


def moment(text: str) -> str:
    """A time given on the command line, as the API reads it. Raises WrongUsage."""
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None:
            time = datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: int(ago[1])})
        else:
            time = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise WrongUsage(
            f"a time is written as 2026-11-23T19:20:40Z, without zone in yours, or as 30m, 2h, 7d ago, not {text!r}"
        ) from None
    return time.isoformat().replace("+00:00", "Z")


def limit(text: str) -> int:
    """How many, given on the command line. Raises WrongUsage."""
    if not (text.isascii() and text.isdigit() and int(text[:10]) > 0 and len(text) < 10):
        raise WrongUsage(f"--limit must be a whole number from 1 on, not {text!r}")
    return int(text)
