"""allow-access, remove-access, list-access: as the plugin `network-policy` of 2017 had them (contract/policy.md 6.1).

For people and scripts used to them: arguments, texts, colours and tabs are the plugin's, errors too go to standard
output. What differs: colours on a terminal only, an app's GUID will do for its name, and everything goes by version v1
of the API, which every policy server since 2017 has.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import responses

from cli import arguments as command_line
from cli import terminal
from cli.apps import App
from cli.arguments import Parser
from cli.client import Policy
from cli.errors import Failed, NotFound, Refused, WrongUsage
from cli.session import Session

help_of: Callable[[Parser], str] = Parser.format_help
"""What follows the reason of wrong usage; the plugin has cf print its own."""

BOLD = "\x1b[;1m"
TAB = 8
GAP = 2
"""Least width between columns."""

_CHANGE = re.compile(r"\S+ \S+( --?[^\s=]+[= ][A-Za-z0-9_-]+){2}")
_LIST = re.compile(r"(--?[^\s=]+[= ][A-Za-z0-9_-]+)?")
_PORTS = "<1-65535>[-<1-65535>]"


def allow(argv: list[str]) -> int:
    """`silkbus allow-access`; the exit code."""
    parser = _change_parser("allow-access", "Allow direct network traffic from one app to another")
    return _change(parser, argv, "Allowing", lambda session, policy: session.client.add([policy]), "adding policies")


def remove(argv: list[str], name: str = "remove-access") -> int:
    """`silkbus remove-access`; the exit code."""
    parser = _change_parser(name, "Remove policy and deny direct network traffic from one app to another")
    return _change(
        parser, argv, "Denying", lambda session, policy: session.client.remove([policy]), "deleting policies"
    )


def deny(argv: list[str]) -> int:
    """`silkbus deny-access`, the older name of remove-access; the exit code."""
    return remove(argv, "deny-access")


def show(argv: list[str]) -> int:
    """`silkbus list-access`; the exit code."""
    parser = command_line.api_parser(
        "list-access",
        "List policy for direct network traffic from one app to another",
        [("", "the policies within the targeted space"), ("--app frontend", "those from or to one app")],
    )
    parser.usage = "%(prog)s [--app appName]"
    parser.add_argument("--app", metavar="appName", help="Application to filter results by. (optional)")

    def run(words: Sequence[str], connect: Callable[[], Session]) -> None:
        if not _LIST.fullmatch(" ".join(words)):
            raise WrongUsage
        name = _flags(words, ("app",))["app"]
        session = connect()
        terminal.say(f"Listing policies{_as(session)}...")
        with _said("getting app"):
            apps = [session.source(name)] if name else []
        with _said("getting policies by id" if name else "getting policies"):
            client = session.client
            policies = client.concerning([app.guid for app in apps]) if name else client.policies()
        with _said("getting apps"):
            names = _names(session, policies)
        _ok()
        rows = [
            (names[policy.source], names[policy.destination], policy.protocol, f"{policy.start}-{policy.end}")
            for policy in policies
            if policy.source in names and policy.destination in names
        ]
        _table(("Source", "Destination", "Protocol", "Ports"), rows)

    return _run(parser, argv, run)


def _names(session: Session, policies: Sequence[Policy]) -> dict[str, str]:
    """The names by GUID of the apps that are shown: of the targeted space or org, or all."""
    if session.org is not None or session.space is not None:
        return {app.guid: app.name for app in session.apps.within(session.org, session.space)}
    known = session.apps.known(guid for policy in policies for guid in (policy.source, policy.destination))
    return {guid: app.name for guid, app in known.items()}


def _change_parser(name: str, description: str) -> Parser:
    parser = command_line.api_parser(
        name,
        description,
        [
            ("frontend backend --protocol tcp --port 8080", "one port"),
            ("frontend backend --protocol udp --port 7000-7010", "a range"),
        ],
    )
    parser.usage = f"%(prog)s SOURCE_APP DESTINATION_APP --protocol <tcp|udp> --port {_PORTS}"
    parser.add_argument("--protocol", metavar="<tcp|udp>", help="Protocol to connect apps with. (required)")
    parser.add_argument("--port", metavar=_PORTS, help="Port(s) to connect to destination app with. (required)")
    return parser


def _change(parser: Parser, argv: list[str], doing: str, act: Callable[[Session, Policy], object], named: str) -> int:
    def run(words: Sequence[str], connect: Callable[[], Session]) -> None:
        if not _CHANGE.fullmatch(" ".join(words)):
            raise WrongUsage
        flags = _flags(words[2:], ("protocol", "port"))
        start, end = _ports(flags["port"])
        if flags["protocol"] not in ("tcp", "udp"):
            raise WrongUsage("Protocol is not valid. Must be tcp or udp.")
        session = connect()
        source, destination = terminal.name(words[0]), terminal.name(words[1])
        terminal.say(f"{doing} traffic from {source} to {destination}{_as(session)}...")
        policy = Policy(
            _app(session, "source", words[0]).guid,
            _app(session, "destination", words[1]).guid,
            flags["protocol"],
            start,
            end,
        )
        with _said(named):
            act(session, policy)
        _ok()
        terminal.say("")

    return _run(parser, argv, run)


def _run(parser: Parser, argv: list[str], command: Callable[[Sequence[str], Callable[[], Session]], None]) -> int:
    """Run a command whose own arguments are `words`, those that say where the API is apart."""
    shared = command_line.api_parser("", "")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    try:
        arguments, words = shared.parse_known_args(argv)
        command(words, lambda: Session(arguments))
    except WrongUsage as error:
        code, text = 2, f"Incorrect usage. {error}\n\n{help_of(parser)}"
    except Failed as error:
        code, text = 1, str(error)
    else:
        return 0
    terminal.say(terminal.coloured("FAILED", terminal.RED))
    terminal.say(text)
    return code


def _flags(words: Sequence[str], known: tuple[str, ...]) -> dict[str, str]:
    """The values of flags given as `-x=v`, `--x=v`, `-x v` or `--x v`, empty if not given."""
    values = dict.fromkeys(known, "")
    for name, value in re.findall(r"--?([^\s=]+)[= ](\S+)", " ".join(words)):
        if name not in values:
            raise WrongUsage(f"flag provided but not defined: -{name}")
        values[name] = value
    return values


def _ports(text: str) -> tuple[int, int]:
    parts = text.split("-")
    if len(parts) > 2:
        raise WrongUsage(f"Port is not valid: {text}")
    if bad := [part for part in parts if not (part.isascii() and part.isdigit())]:
        raise WrongUsage(f"Port is not valid: {bad[0]}")
    start, end = int(parts[0]), int(parts[-1])
    if not (1 <= start <= 65535 and 1 <= end <= 65535):
        raise WrongUsage("Port is not valid. Must be in range <1-65535>.")
    return start, end


def _app(session: Session, end: str, name: str) -> App:
    with _said(f"resolving {end} app"):
        try:
            return session.source(name)
        except NotFound:
            raise Failed(f"{name} not found") from None


@contextmanager
def _said(doing: str) -> Iterator[None]:
    """Failures say what was being done, and the API's with the status of HTTP."""
    try:
        yield
    except Refused as error:
        raise Failed(f"{doing}: {error.status} {responses.get(error.status, '')}: {error.reason}") from None
    except Failed as error:
        raise Failed(f"{doing}: {error}") from None


def _as(session: Session) -> str:
    with _said("could not resolve username"):
        user = session.user
    return f" as {terminal.name(user)}" if user else ""


def _ok() -> None:
    terminal.say(terminal.coloured("OK\n", terminal.GREEN))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns held apart by tabs alone; the header's colour ends at the start of the next line."""
    widths = [-(-(max(map(len, column)) + GAP) // TAB) * TAB for column in zip(header, *rows, strict=True)]
    bold, plain = (BOLD, terminal.RESET) if terminal.colours() else ("", "")

    def line(cells: Sequence[str], named: int) -> str:
        """`named` cells are names, and coloured so."""
        shown = [terminal.name(cell) if index < named else cell for index, cell in enumerate(cells)]
        gaps = ["\t" * -(-(width - len(cell)) // TAB) for cell, width in zip(cells, widths, strict=True)]
        return "".join(f"{cell}{gap}" for cell, gap in zip(shown[:-1], gaps, strict=False)) + shown[-1]

    terminal.say(f"{bold}{line(header, 0)}")
    terminal.say(plain + "\n".join(line(row, 2) for row in rows))
