"""`silkbus doctor`: looks at a cell, and says what is wrong and what to do.

It changes nothing: what must be tried out is tried in a network namespace of its own, and only pings and, when asked
to, one connection are sent.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from ipaddress import AddressValueError, IPv4Address
from typing import Any

import yaml

from bus.settings import SettingsError, command_line, load
from services.doctor import bus, cell, clock, filters, kernel, offload, overlay
from services.doctor.evidence import gather
from services.doctor.finding import Finding, Level, guarded
from services.doctor.offload import Target
from services.doctor.settings import DoctorSettings

PROGRAM = "silkbus doctor"
COLOURS = {Level.OK: "32", Level.WARNING: "33", Level.WRONG: "31;1", Level.UNKNOWN: "36"}

EXAMPLES = """examples:
  silkbus doctor                                        all there is to see
  silkbus doctor --config /etc/silkbus/enforcer.json    with the settings of a service of this cell
  silkbus doctor --through web-0 --to 10.255.30.2:8080  fill a connection, too: are large TCP packets lost?
  silkbus doctor -o json | jq '.findings[] | select(.level == "wrong")'

exit codes: 0 nothing wrong, 1 something is, 2 the command line or the settings cannot be used

"""


def examine(settings: DoctorSettings, target: Target | None = None) -> Iterator[Finding]:
    """All findings, as they are made. Blocks for some seconds."""
    looks: Sequence[tuple[str, Callable[[DoctorSettings], Iterable[Finding]]]] = (
        ("kernel", kernel.look),
        ("iptables", filters.look),
        ("xtables lock", filters.look_at_lock),
        ("conntrack", filters.look_at_conntrack),
        ("overlay", overlay.look_at_device),
        ("offload", partial(offload.look, target=target)),
        ("neighbours", overlay.look_at_neighbours),
        ("addresses", overlay.look_at_addresses),
        ("services", cell.look),
        ("bus", bus.look),
        ("clock", clock.look),
    )
    for check, look in looks:
        yield from guarded(check, partial(look, settings))


def main(argv: list[str]) -> int:
    """The command; its exit code."""
    parser = command_line(DoctorSettings, PROGRAM, "Look at this cell, and say what is wrong and what to do.")
    parser.epilog = EXAMPLES + (parser.epilog or "")
    parser.add_argument("-o", "--output", choices=("table", "json", "yaml"), default="table")
    parser.add_argument("--through", metavar="HANDLE", help="container from which to fill a connection to --to")
    parser.add_argument("--to", metavar="ADDRESS:PORT", help="where to, over the overlay: blank lines are sent there")
    parser.add_argument("--evidence", action="store_true", help="with -o json or yaml: add rules, links and the like")
    parser.add_argument("--verbose", action="store_true", help="say on standard error how checks fail")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger("services.doctor").setLevel(logging.DEBUG if arguments.verbose else logging.CRITICAL)
    if (arguments.through is None) != (arguments.to is None):
        parser.error("--through and --to must be given together")
    try:
        target = None if arguments.to is None else _target(arguments)
        settings = load(DoctorSettings, arguments.config, os.environ, partial=True)
    except (SettingsError, ValueError) as error:
        parser.error(str(error))
    findings = []
    for finding in examine(settings, target):
        findings.append(finding)
        if arguments.output == "table":
            _print(finding)
    if arguments.output != "table":
        report: dict[str, Any] = {"cell": settings.cell or None}
        report["findings"] = [finding.encode() for finding in findings]
        if arguments.evidence:
            report["evidence"] = gather(settings)
        sys.stdout.write(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            if arguments.output == "json"
            else yaml.safe_dump(report, sort_keys=False, allow_unicode=True)
        )
    return 1 if any(finding.level is Level.WRONG for finding in findings) else 0


def _target(arguments: argparse.Namespace) -> Target:
    address, _, port = arguments.to.rpartition(":")
    try:
        number = int(port)
        if not 1 <= number <= 65535:
            raise ValueError
        return Target(arguments.through, IPv4Address(address), number)
    except (AddressValueError, ValueError):
        raise ValueError(f"--to: must be ADDRESS:PORT, as 10.255.30.2:8080, not {arguments.to!r}") from None


def _print(finding: Finding) -> None:
    level = f"{finding.level:8}"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        level = f"\x1b[{COLOURS[finding.level]}m{level}\x1b[0m"
    lines = [f"{level} {finding.check:13} {finding.what}"]
    if finding.remedy:
        lines.append(f"{'':22} → {finding.remedy}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
