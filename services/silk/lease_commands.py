"""`silkbus silk`: what an operator sees of the leases and does to them, in the controllers' database.

The controllers may be running: they see each change in the change log within a second, and publish it.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import yaml
from databases import DatabaseURL

from bus.decode import Malformed
from bus.ledger import Ledger
from bus.log import setup
from bus.messages import Revision, cell_name
from bus.opening import reason
from bus.settings import SettingsError, load
from services.silk.controller_settings import ControllerSettings
from services.silk.expiry import end_expired
from services.silk.leases import LeaseStore, Terms
from services.silk.migrate import CannotOpen, open_ledger, pending
from services.silk.schema import COLUMNS
from services.silk.takeover import CannotTakeOver, take_over

PROGRAM = "silkbus silk"
ACTOR = "silkbus silk"
PAGE = 1000
FORMATS = ("table", "json", "yaml")
LINES = "lines"


class Failed(Exception):
    """The command did not do what it should. The text says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    environment = dict(os.environ)
    if options.database:
        environment["SILKBUS_DATABASE"] = options.database
    try:
        settings = load(ControllerSettings, options.config, environment, partial=True)
        setup("silk", settings.log_level)
        asyncio.run(_run(settings, options))
    except (SettingsError, CannotOpen, CannotTakeOver, Failed) as error:
        sys.stderr.write("".join(f"{PROGRAM} {options.command}: {line}\n" for line in str(error).splitlines()))
        return 1
    except BrokenPipeError:  # who reads has seen enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="The leases of cells, in the Silk controllers' database.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}")
        made.add_argument("--database", metavar="URL", help="the database; else as the controller is told it")
        made.add_argument("--config", type=Path, metavar="FILE", help="the controller's settings")
        return made

    for listing in (
        command("leases", "list the leases", "With the seconds since each was renewed, by the database's clock."),
        command("history", "list what became of leases, and by whom", "The oldest first."),
    ):
        listing.add_argument("-o", "--output", choices=FORMATS, default="table", help="how to print them [table]")
        listing.add_argument("--json", dest="output", action="store_const", const=LINES, help="one JSON object a line")
    commands.choices["history"].add_argument("--cell", metavar="NAME", help="of this cell only")
    release = command(
        "release",
        "end the lease of a cell that is no more",
        "Its subnet then rests before another cell gets it. A cell that lives is fenced by this, and asks anew.",
    )
    release.add_argument("cell", metavar="CELL", help="the cell's name or underlay address")
    command(
        "expire",
        "end all leases whose time is over, however many",
        "For when the controllers say that too many are due for them to decide.",
    )
    take = command(
        "import",
        "take over the leases of the original's controller",
        "Every cell keeps its subnet. Nothing is changed there. Stop the original's controllers first; its cells may"
        " go on. Safe to repeat.",
    )
    take.add_argument(
        "--from", dest="source", metavar="URL", help="the original's database; left out: its table lies in ours"
    )
    migrate = command("migrate", "bring the schema up to date", "Each controller does so at its start.")
    migrate.add_argument("--dry-run", action="store_true", help="only list the steps that would be taken")
    return parser


async def _run(settings: ControllerSettings, options: argparse.Namespace) -> None:
    steps = await pending(settings.database, settings.database_options)
    if options.command == "migrate" and options.dry_run:
        _print(*(steps or ["the schema is up to date"]))
        return
    async with open_ledger(settings.database, settings.database_options) as ledger:
        terms = Terms(settings.pool, settings.lease_expiry, settings.subnet_rest)
        store = LeaseStore(ledger, terms)
        try:
            match options.command:
                case "migrate":
                    _print(*(steps or ["the schema is up to date"]))
                case "leases":
                    await _leases(store, options.output)
                case "history":
                    await _history(ledger, options.cell, options.output)
                case "release":
                    await _release(store, options.cell)
                case "expire":
                    ended = (await end_expired(store, f"{ACTOR} expire")).result or []
                    _print(*(f"{lease.subnet} of {lease.cell}" for lease in ended), f"{len(ended)} ended")
                case "import":
                    await _import(ledger, options.source or settings.database, terms, settings)
        except (Failed, CannotTakeOver, BrokenPipeError):
            raise
        except Exception as error:
            url = DatabaseURL(settings.database).obscure_password
            raise Failed(f"database {url}: {reason(error)}") from error


async def _leases(store: LeaseStore, form: str) -> None:
    rows = await store.ledger.database.fetch_all(
        f"SELECT {COLUMNS}, acquired_at, renewed_at, {store.clock} - renewed_at AS age,"  # noqa: S608
        f" {store.ends_at} < {store.clock} AS expired FROM leases"
    )
    rows = sorted(rows, key=lambda row: IPv4Network(row["subnet"]))
    if form != "table":
        _print_values(form, [{**dict(row), "expired": bool(row["expired"])} for row in rows])
        return
    line = "{:18}  {:15}  {:>11}  {}"
    _print(line.format("SUBNET", "UNDERLAY", "RENEWED", "CELL"))
    for row in rows:
        subnet = IPv4Network(row["subnet"])
        note = "" if store.terms.pool.kind_of(subnet) else "  (outside the pool)"
        late = "  (expired)" if row["expired"] else ""
        _print(line.format(row["subnet"], row["underlay"], f"{row['age']} s ago", f"{row['cell']}{note}{late}"))


async def _history(ledger: Ledger, cell: str | None, form: str) -> None:
    line = "{:>9}  {:20}  {:9}  {:18}  {:15}  {:24}  {}"
    events = (event async for event in _events(ledger) if cell in (None, event["cell"]))
    if form in FORMATS[1:]:
        _print_values(form, [event async for event in events])
        return
    if form == "table":
        _print(line.format("REVISION", "TIME", "EVENT", "SUBNET", "UNDERLAY", "CELL", "BY"))
    async for event in events:
        columns = ("revision", "time", "event", "subnet", "underlay", "cell", "by")
        _print(json.dumps(event) if form == LINES else line.format(*(event[name] for name in columns)))


async def _events(ledger: Ledger) -> AsyncIterator[dict[str, Any]]:
    """All that the change log has, in order."""
    revision = Revision(0)
    while entries := await ledger.log_from(revision, limit=PAGE):
        revision = Revision(entries[-1].revision + 1)
        for entry in entries:
            time = datetime.fromtimestamp(entry.changed_at_ms // 1000, UTC).isoformat().replace("+00:00", "Z")
            for event in entry.events:
                kind = str(event["kind"]).rpartition(".")[2]
                yield {"revision": entry.revision, "time": time, "event": kind, **event["data"], "by": entry.actor}


async def _release(store: LeaseStore, cell: str) -> None:
    try:
        column, value = "underlay", IPv4Address(cell)
    except ValueError:
        try:
            column, value = "cell", cell_name(cell)  # type: ignore[assignment]
        except Malformed as error:
            raise Failed(str(error)) from None
    lease = (await store.release_where(column, value, f"{ACTOR} release")).result
    if lease is None:
        raise Failed(f"{cell}: has no lease; `silkbus silk leases` lists those there are")
    _print(f"{lease.subnet} of {lease.cell} at {lease.underlay}: released; it rests for {store.terms.rest} s")


async def _import(ledger: Ledger, source: str, terms: Terms, settings: ControllerSettings) -> None:
    report = await take_over(ledger, source, terms, settings.database_options)
    _print(
        f"from {DatabaseURL(source).obscure_password}:",
        f"  {len(report.added)} leases taken over",
        f"  {report.present} were there already",
    )
    if report.left_out:
        _print(f"  {len(report.left_out)} left out:", *(f"    {why}" for why in report.left_out))


def _print_values(form: str, values: list[dict[str, Any]]) -> None:
    match form:
        case "json":
            _print(json.dumps(values, indent=2))
        case "yaml":
            _print(yaml.safe_dump(values, sort_keys=False).rstrip("\n"))
        case _:
            _print(*map(json.dumps, values))


def _print(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
