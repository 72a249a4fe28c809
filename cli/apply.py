"""`silkbus apply`, `diff` and `export`: policies as a file (docs/policy-as-code.md)."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cli import arguments as command_line
from cli import manifest, output, plan, terminal, wait
from cli.apps import App
from cli.client import Policy
from cli.errors import Failed
from cli.history import sentence
from cli.manifest import Manifest, Ports, Reference
from cli.manifest_reader import parse
from cli.plan import Plan
from cli.policies import as_value
from cli.session import Session

DIFFERENT = 1
ERROR = 2
EXIT_CODES = "exit codes: 0 done, or no difference; 1 with diff and --dry-run: a difference; 2 an error"


def apply(argv: list[str]) -> int:
    """`silkbus apply`; the exit code."""
    parser = _parser(
        "apply",
        f"Make the policies be what a file says.\n{EXIT_CODES}",
        [
            ("-f policies.yml", "add what is missing, remove nothing"),
            ("-f policies.yml --prune", "remove, too, what the file does not have, within the spaces it names"),
            ("-f policies.yml --prune --dry-run", "only say what that would do"),
            ("-f policies.yml --prune --wait", "return when all live cells enforce it"),
        ],
    )
    parser.add_argument(
        "--prune", action="store_true", help="remove policies of the file's spaces that it does not have"
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and say what would be")
    wait.add_options(parser)

    def run(arguments: argparse.Namespace) -> int:
        session, content = Session(arguments), _read(arguments.file)
        found = _plan(session, content)
        remove = found.extra if arguments.prune else []
        if not arguments.dry_run:
            revision = _change(session, found.add, remove)
        _show(arguments, found, remove, done=not arguments.dry_run)
        if arguments.dry_run:
            return DIFFERENT if found.add or remove else 0
        code = wait.after(session.client, arguments, revision)
        if arguments.output == "table" and code != wait.TOO_LATE:
            terminal.ok()
        return code

    return command_line.run(parser, argv, run, failed=ERROR)


def diff(argv: list[str]) -> int:
    """`silkbus diff`; the exit code."""
    parser = _parser(
        "diff",
        f"Say how the policies differ from a file, within the spaces it names.\n{EXIT_CODES}",
        [
            ("-f policies.yml", "+ is missing and would be added, - is not in the file and would be pruned"),
            ("-f policies.yml -o json", "for programs"),
        ],
    )

    def run(arguments: argparse.Namespace) -> int:
        session, content = Session(arguments), _read(arguments.file)
        found = _plan(session, content)
        _show(arguments, found, found.extra, done=False)
        return DIFFERENT if found.differs else 0

    return command_line.run(parser, argv, run, failed=ERROR)


def export(argv: list[str]) -> int:
    """`silkbus export`; the exit code."""
    parser = command_line.api_parser(
        "export",
        "Print the policies as a file for `silkbus apply`: those of the targeted space's apps, or all.",
        [
            ("> policies.yml", "the targeted space, or all if none is targeted"),
            ("--all > policies.yml", "all that you may see"),
            ("-o json", "the same as JSON, which apply reads, too"),
        ],
    )
    parser.add_argument("--all", action="store_true", help="not only those of the targeted space's apps")
    parser.add_argument("-o", "--output", choices=("yaml", "json"), default="yaml", help="how to print them")

    def run(arguments: argparse.Namespace) -> None:
        session = Session(arguments)
        sources = None
        if session.space is not None and not arguments.all:
            sources = [app.guid for app in session.apps.within(session.org, session.space)]
        policies = session.client.policies(sources=sources)
        apps = session.apps.known(guid for policy in policies for guid in (policy.source, policy.destination))
        ambiguous = _ambiguous(apps)
        named = {guid: _reference(app, ambiguous) for guid, app in apps.items()}
        content = manifest.document(
            (named[policy.source], named[policy.destination], Ports(policy.protocol, policy.start, policy.end))
            for policy in policies
        )
        text = manifest.as_yaml(content) if arguments.output == "yaml" else manifest.as_json(content)
        terminal.say(text.rstrip("\n"))

    return command_line.run(parser, argv, run, failed=ERROR)


def _parser(command: str, description: str, examples: Sequence[command_line.Example]) -> command_line.Parser:
    parser = command_line.api_parser(command, description, examples)
    parser.add_argument(
        "-f", "--file", required=True, metavar="FILE", help="the policies, as YAML; - is standard input"
    )
    command_line.add_output(parser)
    return parser


def _read(file: str) -> Manifest:
    name = "standard input" if file == "-" else file
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return parse(content.decode("utf-8-sig"), name)
    except OSError as error:
        raise Failed(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Failed(f"{name}:{line}: is not UTF-8 text") from None


def _plan(session: Session, content: Manifest) -> Plan:
    return plan.make(content, session.apps, session.client.policies(), session.org, session.space)


def _change(session: Session, add: list[Policy], remove: list[Policy]) -> int | None:
    """One request for what is to be added, then one for what is to be removed, so that nothing is cut in between."""
    revision = None
    if add:
        revision = session.client.add(add)
    if remove:
        try:
            revision = session.client.remove(remove)
        except Failed as error:
            added = f"{_number(len(add))} added, " if add else ""
            raise Failed(f"{added}but removing failed: {error}\nApply the file again to go on.") from None
    return revision


def _show(arguments: argparse.Namespace, found: Plan, remove: list[Policy], *, done: bool) -> None:
    left = [] if remove else found.extra
    if arguments.output != "table":
        groups = {"add": found.add, "remove": remove, "extra": left, "kept": found.kept}
        value = {
            name: [as_value(policy, found.apps[policy.source], found.apps[policy.destination]) for policy in policies]
            for name, policies in groups.items()
        }
        output.structured(arguments.output, {**value, "done": done})
        return
    for sign, policies, paint in (("+", found.add, terminal.GREEN), ("-", remove, terminal.RED)):
        for policy in policies:
            terminal.say(terminal.coloured(f"{sign} {sentence(policy, found.apps)}", paint))
    added, removed = ("added", "removed") if done else ("to add", "to remove")
    terminal.say(f"{_number(len(found.add))} {added}, {len(remove)} {removed}, {len(found.kept)} as they should be.")
    if left:
        terminal.say(f"{_number(len(left))} of these spaces not in {arguments.file}; --prune removes them.")


def _number(count: int) -> str:
    return f"{count} polic{'y' if count == 1 else 'ies'}"


def _reference(app: App, ambiguous: frozenset[tuple[str, str, str]]) -> Reference:
    """By name, where that leads back to the same app."""
    full = (app.org, app.space, app.name)
    return Reference(guid=app.guid) if not all(full) or full in ambiguous else Reference(app.name, app.space, app.org)


def _ambiguous(apps: Mapping[str, App]) -> frozenset[tuple[str, str, str]]:
    """Full names that several apps have, as in a directory that lists old ones, too."""
    seen: set[tuple[str, str, str]] = set()
    twice: set[tuple[str, str, str]] = set()
    for app in apps.values():
        full = (app.org, app.space, app.name)
        (twice if full in seen else seen).add(full)
    return frozenset(twice)
