"""The command lines: a parser whose help teaches by example, and the options that many commands share."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from cli import output, terminal
from cli.errors import WrongUsage

Example = tuple[str, str]
"""Arguments after the command's name, and what they do."""


typed: Callable[[str], str] = "silkbus {}".format
"""What is typed to call a command; the plugin's are called otherwise."""


class Parser(argparse.ArgumentParser):
    """A command's. Raises WrongUsage rather than ending the program."""

    def __init__(self, command: str, description: str, examples: Sequence[Example] = ()) -> None:
        program = typed(command)
        shown = [f"  {program} {arguments}".rstrip() + f"\n      {what}" for arguments, what in examples]
        super().__init__(
            prog=program,
            description=description,
            epilog="\n".join(["examples:", *shown]) if shown else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise WrongUsage(message)


def api_parser(command: str, description: str, examples: Sequence[Example] = ()) -> Parser:
    """The parser of a command that speaks to the API; `cli.session.Session` takes what it parsed."""
    parser = Parser(command, description, examples)
    group = parser.add_argument_group("where the API is and who asks (else environment, cf's login, or a file)")
    group.add_argument("--api", metavar="URL", help="the policy server, or the Cloud Controller [SILKBUS_API]")
    group.add_argument("--token-file", metavar="FILE", help="file that holds the token [SILKBUS_TOKEN_FILE]")
    group.add_argument("--directory", metavar="FILE", help="names of the apps, as JSON [SILKBUS_DIRECTORY]")
    group.add_argument(
        "--skip-ssl-validation",
        action="store_const",
        const="true",
        help="do not check the API's certificate [SILKBUS_SKIP_SSL_VALIDATION]",
    )
    return parser


def add_output(parser: Parser, *, short: bool = True) -> None:
    """`--output`, also as `-o` where that is not cf's -o ORG; `arguments.output` is one of `output.FORMATS`."""
    parser.add_argument(
        *(["-o"] if short else []), "--output", choices=output.FORMATS, default="table", help="how to print the result"
    )


def run(
    parser: Parser, argv: Sequence[str], command: Callable[[argparse.Namespace], int | None], *, failed: int = 1
) -> int:
    """Parse, run and report; the exit code: what the command returns, `failed` when it failed, 2 for wrong usage."""
    return terminal.guarded(lambda: command(parser.parse_args(argv)), parser.format_usage, failed=failed)
