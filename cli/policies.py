"""add-network-policy, remove-network-policy and network-policies, as the cf CLI has them (contract/policy.md 6.2).

What differs: the user is not named ("as U"), since a token from a file does not say whose it is; source and destination
need no targeted space when their names are unique; a GUID will do for a name.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NoReturn

from cli import configuration, terminal
from cli.client import Client, Policy
from cli.directory import App, Directory
from cli.errors import WrongUsage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongUsage(message)


class _Session:
    """What every command needs, made from its command line and the configuration."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        flags = {"api": arguments.api, "token_file": arguments.token_file, "directory": arguments.directory}
        self.configuration = configuration.load(flags)
        self.client = Client(self.configuration.api, self.configuration.token)
        self.directory = Directory(self.configuration.directory)

    def source(self, name: str) -> App:
        return self.directory.find(name, self.configuration.org, self.configuration.space)

    def destination(self, name: str, arguments: argparse.Namespace, source: App) -> App:
        if arguments.space is None:
            return self.directory.find(name, self.configuration.org, self.configuration.space)
        if self.directory.path is None:
            raise WrongUsage("a space can be given only with a directory of apps: --directory FILE, SILKBUS_DIRECTORY")
        return self.directory.find(name, arguments.org or source.org, arguments.space)


def add(argv: list[str]) -> int:
    """`silkbus add-network-policy`; the exit code."""
    parser = _change_parser(
        "add-network-policy", "Create policy to allow direct network traffic from one app to another."
    )

    def run(arguments: argparse.Namespace) -> None:
        _check_change(arguments)
        if (arguments.protocol is None) != (arguments.port is None):
            raise WrongUsage("--protocol and --port flags must be specified together")
        session = _Session(arguments)
        policy = _policy(session, arguments, "Adding")
        session.client.add([policy])
        terminal.ok()

    return _run(parser, argv, run)


def remove(argv: list[str]) -> int:
    """`silkbus remove-network-policy`; the exit code."""
    parser = _change_parser("remove-network-policy", "Remove network traffic policy of an app.")

    def run(arguments: argparse.Namespace) -> None:
        _check_change(arguments)
        _require("flag", "specified", {"--protocol": arguments.protocol, "--port": arguments.port}, close="'")
        session = _Session(arguments)
        policy = _policy(session, arguments, "Removing")
        if policy in session.client.policies(sources=[policy.source]):
            session.client.remove([policy])
        else:
            terminal.say("Policy does not exist.")
        terminal.ok()

    return _run(parser, argv, run)


def show(argv: list[str]) -> int:
    """`silkbus network-policies`; the exit code."""
    parser = _parser("network-policies", "List direct network traffic policies.")
    parser.add_argument("--source", metavar="SOURCE_APP", help="only those of this app")
    parser.add_argument("--output", choices=("table", "json"), default="table", help="how to print them")

    def run(arguments: argparse.Namespace) -> None:
        session = _Session(arguments)
        target = session.configuration
        sources: list[str] | None = None
        of = ""
        if arguments.source is not None:
            app = session.source(arguments.source)
            of, sources = f" of app {terminal.name(app.name)}", [app.guid]
        elif target.space is not None:
            sources = [app.guid for app in session.directory.within(target.org, target.space)]
        if arguments.output == "table":
            terminal.say(f"Listing network policies{of}{_place(target.org, target.space)}...\n")
        policies = session.client.policies(sources=sources)
        ends = [
            (policy, session.directory.app(policy.source), session.directory.app(policy.destination))
            for policy in policies
        ]
        if arguments.output == "json":
            terminal.say(json.dumps([_as_json(*row) for row in ends], indent=2, ensure_ascii=False))
        else:
            header = ("source", "destination", "protocol", "ports", "destination space", "destination org")
            terminal.table(header, [_as_row(*row) for row in ends])

    return _run(parser, argv, run)


def _parser(command: str, description: str) -> _Parser:
    parser = _Parser(prog=f"silkbus {command}", description=description, allow_abbrev=False)
    parser.add_argument("--api", metavar="URL", help="where the policy server is [SILKBUS_API]")
    parser.add_argument("--token-file", metavar="FILE", help="file that holds the token [SILKBUS_TOKEN_FILE]")
    parser.add_argument("--directory", metavar="FILE", help="names of the apps, as JSON [SILKBUS_DIRECTORY]")
    return parser


def _change_parser(command: str, description: str) -> _Parser:
    parser = _parser(command, description)
    parser.add_argument("source", metavar="SOURCE_APP", nargs="?")
    parser.add_argument("destination", metavar="DESTINATION_APP", nargs="?")
    parser.add_argument("-s", dest="space", metavar="SPACE", help="the destination's space")
    parser.add_argument("-o", dest="org", metavar="ORG", help="the destination's org")
    parser.add_argument("--protocol", type=_protocol, metavar="tcp|udp", help="default for adding: tcp")
    parser.add_argument("--port", type=_ports, metavar="N|N-M", help="port or range; default for adding: 8080")
    return parser


def _run(parser: _Parser, argv: Sequence[str], command: Callable[[argparse.Namespace], None]) -> int:
    return terminal.guarded(lambda: command(parser.parse_args(argv)), parser.format_usage())


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


def _policy(session: _Session, arguments: argparse.Namespace, doing: str) -> Policy:
    """The policy that the command line means; says on the terminal what is being done."""
    source = session.source(arguments.source)
    destination = session.destination(arguments.destination, arguments, source)
    here, there = _place(source.org, source.space), _place(destination.org, destination.space)
    apart = arguments.space is not None or here != there
    terminal.say(
        f"{doing} network policy from app {terminal.name(source.name)}{here if apart else ''}"
        f" to app {terminal.name(destination.name)}{there}..."
    )
    start, end = arguments.port or (8080, 8080)
    return Policy(source.guid, destination.guid, arguments.protocol or "tcp", start, end)


def _protocol(text: str) -> str:
    if text.lower() not in ("tcp", "udp"):
        raise WrongUsage('PROTOCOL must be "tcp" or "udp"')
    return text.lower()


def _ports(text: str) -> tuple[int, int]:
    parts = text.split("-")
    if len(parts) > 2:
        raise WrongUsage("PORT syntax must match integer[-integer]")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
        raise WrongUsage("PORT must be a positive integer")
    return int(parts[0]), int(parts[-1])


def _place(org: str | None, space: str | None) -> str:
    parts = [f"{kind} {terminal.name(value)}" for kind, value in (("org", org), ("space", space)) if value]
    return f" in {' / '.join(parts)}" if parts else ""


def _as_row(policy: Policy, source: App, destination: App) -> tuple[str, ...]:
    ports = str(policy.start) if policy.start == policy.end else f"{policy.start}-{policy.end}"
    return source.name, destination.name, policy.protocol, ports, destination.space, destination.org


def _as_json(policy: Policy, source: App, destination: App) -> dict[str, object]:
    return {
        "source": asdict(source),
        "destination": asdict(destination),
        "protocol": policy.protocol,
        "ports": {"start": policy.start, "end": policy.end},
    }
