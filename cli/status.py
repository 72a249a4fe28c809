"""`silkbus status`: the latest revision of the policies, and which cells enforce it."""

import argparse
from typing import Any

from cli import arguments as command_line
from cli import output, terminal, wait
from cli.errors import Failed, WrongUsage
from cli.session import Session

HEADER = ("cell", "state", "revision", "details")


def show(argv: list[str]) -> int:
    """`silkbus status`; the exit code."""
    parser = command_line.api_parser(
        "status",
        "Show the revision of the policies, and which cells enforce it. Only network.admin is told the cells' names.",
        [
            ("", "the latest revision"),
            ("--revision 4711", "one that a change had"),
            ("--wait --timeout 30", "return when all live cells enforce it"),
            ("-o json", "for programs"),
        ],
    )
    parser.add_argument("--revision", type=revision, metavar="N", help="not the latest, but this one")
    wait.add_options(parser)
    command_line.add_output(parser)

    def run(arguments: argparse.Namespace) -> int:
        session = Session(arguments)
        code = wait.after(session.client, arguments, arguments.revision)
        query = "" if arguments.revision is None else f"?revision={arguments.revision}"
        status = session.client.get(f"/status{query}")
        if arguments.output != "table":
            output.structured(arguments.output, status)
        else:
            try:
                _print(status)
            except (KeyError, TypeError) as error:
                raise Failed(f"{session.client.server.url} answered a status not understood: {error!r}") from None
        return code

    return command_line.run(parser, argv, run)


def _print(status: Any) -> None:
    head = "" if status["revision"] == status["head"] else f" of {status['head']}"
    place = (
        (terminal.GREEN, "enforced by all live cells") if status["realised"] else (terminal.RED, "not yet everywhere")
    )
    terminal.say(f"Revision {status['revision']}{head}: {terminal.coloured(place[1], place[0])}")
    counts = (f"{status[name]['count']} {name}" for name in ("enforcing", "behind", "unreachable"))
    terminal.say(f"Cells: {', '.join(counts)}")
    if not status["bus_connected"]:
        terminal.say("The policy server is not connected to the bus: it hears no cell. Look at its log.")
    if not status["leases_known"]:
        terminal.say("Which cells there are is not known: no Silk controller answers.")
    rows = [
        *((cell, "enforcing", str(status["revision"]), "") for cell in status["enforcing"].get("cells", ())),
        *(
            (item["cell"], "behind", _known(item["revision"]), item["problem"] or "")
            for item in status["behind"].get("cells", ())
        ),
        *(
            (item["cell"], "unreachable", "", _silence(item["silent_seconds"]))
            for item in status["unreachable"].get("cells", ())
        ),
    ]
    if rows:
        terminal.say("")
        terminal.table(HEADER, sorted(rows))


def _known(number: int | None) -> str:
    return "another database's" if number is None else str(number)


def _silence(seconds: float | None) -> str:
    return "never heard of" if seconds is None else f"silent for {seconds} s"


def revision(text: str) -> int:
    """A revision given on the command line. Raises WrongUsage."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise WrongUsage(f"--revision must be a whole number, not {text!r}")
    return int(text)
