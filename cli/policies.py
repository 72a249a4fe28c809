"""add-network-policy, remove-network-policy and network-policies, as the cf CLI has them (contract/policy.md 6.2).

What differs: the user is named ("as U") only if the token tells whose it is; without the cf CLI, source and destination
need no targeted space when their names are unique; a GUID will do for a name. As with cf, `-o` is the destination's org
where there is a destination, so that only `--output` says there how to print; elsewhere `-o` means that, too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from cli import arguments as command_line
from cli import output, terminal, wait
from cli.apps import App
from cli.client import Policy
from cli.errors import WrongUsage
from cli.session import Session


def add(argv: list[str]) -> int:
    """`silkbus add-network-policy`; the exit code."""
    parser = _change_parser(
        "add-network-policy",
        "Create policy to allow direct network traffic from one app to another.",
        [
            ("frontend backend", "tcp, port 8080"),
            ("frontend backend --protocol udp --port 7000-7010", "a range of ports"),
            ("frontend db -s prod -o other --protocol tcp --port 5432", "to an app of another space and org"),
            ("frontend backend --wait", "return when all live cells enforce it"),
        ],
    )

    def run(arguments: argparse.Namespace) -> int:
        _check_change(arguments)
        if (arguments.protocol is None) != (arguments.port is None):
            raise WrongUsage("--protocol and --port flags must be specified together")
        session = Session(arguments)
        policy, ends = _policy(session, arguments, "Adding")
        return _done(session, arguments, policy, ends, session.client.add([policy]))

    return command_line.run(parser, argv, run)


def remove(argv: list[str]) -> int:
    """`silkbus remove-network-policy`; the exit code."""
    parser = _change_parser(
        "remove-network-policy",
        "Remove network traffic policy of an app. Protocol and ports must be those it was made with.",
        [
            ("frontend backend --protocol tcp --port 8080", "one port"),
            ("frontend db -s prod --protocol tcp --port 5000-5010", "a range, to an app of another space"),
        ],
    )

    def run(arguments: argparse.Namespace) -> int:
        _check_change(arguments)
        _require("flag", "specified", {"--protocol": arguments.protocol, "--port": arguments.port}, close="'")
        session = Session(arguments)
        policy, ends = _policy(session, arguments, "Removing")
        revision = None
        existed = policy in session.client.policies(sources=[policy.source])
        if existed:
            revision = session.client.remove([policy])
        elif arguments.output == "table":
            terminal.say("Policy does not exist.")
        return _done(session, arguments, policy, ends, revision, existed=existed)

    return command_line.run(parser, argv, run)


def show(argv: list[str]) -> int:
    """`silkbus network-policies`; the exit code."""
    parser = command_line.api_parser(
        "network-policies",
        "List direct network traffic policies: those of the apps of the targeted space or org, or all.",
        [
            ("", "every policy whose source is in the targeted space"),
            ("--source frontend", "only those of one app"),
            ("-o json", "for programs"),
        ],
    )
    parser.add_argument("--source", metavar="SOURCE_APP", help="only those of this app")
    command_line.add_output(parser)

    def run(arguments: argparse.Namespace) -> None:
        session = Session(arguments)
        sources: list[App] | None = None
        of = ""
        if arguments.source is not None:
            app = session.source(arguments.source)
            of, sources = f" of app {terminal.name(app.name)}", [app]
        elif session.org is not None or session.space is not None:
            sources = session.apps.within(session.org, session.space)
        if arguments.output == "table":
            terminal.say(f"Listing network policies{of}{_place(session.org, session.space)}{_as(session)}...\n")
        guids = None if sources is None else [app.guid for app in sources]
        rows = with_names(session, session.client.policies(sources=guids), sources or [])
        header = ("source", "destination", "protocol", "ports", "destination space", "destination org")
        value = [as_value(*row) for row in rows]
        output.write(arguments.output, value, header, [_as_row(*row) for row in rows])

    return command_line.run(parser, argv, run)


def with_names(
    session: Session, policies: Sequence[Policy], sources: Sequence[App] = ()
) -> list[tuple[Policy, App, App]]:
    """Each policy with its source, one of `sources` if they are known, and its destination."""
    apps = {app.guid: app for app in sources}
    ends = (guid for policy in policies for guid in (policy.source, policy.destination))
    if apps:
        ends = (policy.destination for policy in policies)
    apps |= session.apps.known(ends)
    return [(policy, apps[policy.source], apps[policy.destination]) for policy in policies]


def as_value(policy: Policy, source: App, destination: App) -> dict[str, object]:
    """A policy as JSON and YAML show it."""
    return {
        "source": asdict(source),
        "destination": asdict(destination),
        "protocol": policy.protocol,
        "ports": {"start": policy.start, "end": policy.end},
    }


def protocol(text: str) -> str:
    """`tcp` or `udp`, given in whatever case. Raises WrongUsage."""
    if text.lower() not in ("tcp", "udp"):
        raise WrongUsage('PROTOCOL must be "tcp" or "udp"')
    return text.lower()


def ports(text: str) -> tuple[int, int]:
    """First and last port of `N` or `N-M`; whether they can be ports is the server's to say. Raises WrongUsage."""
    parts = text.split("-")
    if len(parts) > 2:
        raise WrongUsage("PORT syntax must match integer[-integer]")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
        raise WrongUsage("PORT must be a positive integer")
    return int(parts[0]), int(parts[-1])


def _change_parser(command: str, description: str, examples: list[command_line.Example]) -> command_line.Parser:
    parser = command_line.api_parser(command, description, examples)
    parser.add_argument("source", metavar="SOURCE_APP", nargs="?")
    parser.add_argument("destination", metavar="DESTINATION_APP", nargs="?")
    parser.add_argument("-s", dest="space", metavar="SPACE", help="the destination's space")
    parser.add_argument("-o", dest="org", metavar="ORG", help="the destination's org")
    parser.add_argument("--protocol", type=protocol, metavar="tcp|udp", help="default for adding: tcp")
    parser.add_argument("--port", type=ports, metavar="N|N-M", help="port or range; default for adding: 8080")
    wait.add_options(parser)
    command_line.add_output(parser, short=False)
    return parser


def _check_change(arguments: argparse.Namespace) -> None:
    positional = {"SOURCE_APP": arguments.source, "DESTINATION_APP": arguments.destination}
    _require("argument", "provided", positional, close="`")
    if arguments.org is not None and arguments.space is None:
        raise WrongUsage("A space must be provided when an org is provided, but the '-s' flag was not specified.")


def _require(kind: str, done: str, values: dict[str, object], *, close: str) -> None:
    missing = [f"`{name}{close}" for name, value in values.items() if value is None]
    if missing:
        plural, verb = ("s", "were") if len(missing) > 1 else ("", "was")
        raise WrongUsage(f"the required {kind}{plural} {' and '.join(missing)} {verb} not {done}")


def _policy(session: Session, arguments: argparse.Namespace, doing: str) -> tuple[Policy, tuple[App, App]]:
    """The policy that the command line means, and its apps; says on the terminal what is being done."""
    source = session.source(arguments.source)
    destination = session.destination(arguments.destination, arguments.org, arguments.space, source)
    here, there = _place(source.org, source.space), _place(destination.org, destination.space)
    apart = arguments.space is not None or here != there
    if arguments.output == "table":
        terminal.say(
            f"{doing} network policy from app {terminal.name(source.name)}{here if apart else ''}"
            f" to app {terminal.name(destination.name)}{there}{_as(session)}..."
        )
    start, end = arguments.port or (8080, 8080)
    policy = Policy(source.guid, destination.guid, arguments.protocol or "tcp", start, end)
    return policy, (source, destination)


def _done(
    session: Session,
    arguments: argparse.Namespace,
    policy: Policy,
    ends: tuple[App, App],
    revision: int | None,
    **more: object,
) -> int:
    """Say that it is done, after waiting if that was asked for; the exit code. Programs are told `more`, too."""
    code = wait.after(session.client, arguments, revision)
    if arguments.output != "table":
        output.structured(arguments.output, as_value(policy, *ends) | {"revision": revision} | more)
    elif code != wait.TOO_LATE:
        terminal.ok()
    return code


def _as(session: Session) -> str:
    return f" as {terminal.name(session.user)}" if session.user else ""


def _place(org: str | None, space: str | None) -> str:
    parts = [f"{kind} {terminal.name(value)}" for kind, value in (("org", org), ("space", space)) if value]
    return f" in {' / '.join(parts)}" if parts else ""


def _as_row(policy: Policy, source: App, destination: App) -> tuple[str, ...]:
    return source.name, destination.name, policy.protocol, policy.ports, destination.space, destination.org
