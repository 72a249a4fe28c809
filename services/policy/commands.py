"""`silkbus policy`: what an operator does to the policy server's database, beside the servers."""

import argparse
import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from databases import DatabaseURL

from bus.log import setup
from bus.settings import CentralSettings, SettingsError, load, setting
from services.policy.migrate import CannotOpen, open_ledger, pending
from services.policy.restored import restored
from services.policy.tag_pool import REST_MARGIN
from services.policy.takeover import Refused, Report, take_over

PROGRAM = "silkbus policy"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings(CentralSettings):
    """Those of the policy server's settings that say which database it has, and how it is connected to."""

    database: str = setting("SQL database, as a URL", "sqlite:///policy.db")
    max_stale: int = setting("seconds a cell may act on its last known state; freed tags rest longer", 604_800)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    environment = dict(os.environ)
    if options.database:
        environment["SILKBUS_DATABASE"] = options.database
    try:
        settings = load(DatabaseSettings, options.config, environment, partial=True)
        setup("policy", settings.log_level)
        if options.command == "migrate":
            asyncio.run(_migrate(settings, options.dry_run))
        elif options.command == "restored":
            asyncio.run(_restored(settings, options.given))
        else:
            asyncio.run(_import(settings, options.source))
    except (SettingsError, CannotOpen, Refused) as error:
        sys.stderr.write("".join(f"{PROGRAM} {options.command}: {line}\n" for line in str(error).splitlines()))
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="The policy server's database.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    migrate = commands.add_parser(
        "migrate",
        help="bring the schema up to date",
        description="Bring the schema up to date, as each server does.",
    )
    migrate.add_argument("--dry-run", action="store_true", help="only list the steps that would be taken")
    take = commands.add_parser(
        "import",
        help="take over the database of Cloud Foundry's own policy server",
        description="Take over tags, policies and security groups from the database of Cloud Foundry's own policy "
        "server. Nothing is changed there. Stop the original's servers first. Safe to repeat.",
    )
    take.add_argument(
        "--from",
        dest="source",
        metavar="URL",
        help="the original's database; left out: its tables lie in our own database",
    )
    after = commands.add_parser(
        "restored",
        help="see to the tags, once after the database was restored from a dump",
        description="Keep tags that were given out after the dump from being given to other apps, which a cell that is "
        "cut off would take for the first. Once after each restoring, before the servers are started (docs/backup.md).",
    )
    after.add_argument(
        "--given",
        type=_count,
        metavar="N",
        help="how many apps may have got their first policy since the dump; left out: half of the tags never used",
    )
    for command in (migrate, take, after):
        command.add_argument("--database", metavar="URL", help="our database; else as the policy server is told it")
        command.add_argument("--config", type=Path, metavar="FILE", help="the policy server's settings")
    return parser


async def _migrate(settings: DatabaseSettings, dry_run: bool) -> None:
    steps = await pending(settings.database, settings.database_options)
    if not dry_run:
        async with open_ledger(settings.database, settings.database_options):
            pass
    sys.stdout.write("".join(f"{step}\n" for step in steps) if steps else "the schema is up to date\n")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text!r}")
    return int(text)


async def _restored(settings: DatabaseSettings, given: int | None) -> None:
    async with open_ledger(settings.database, settings.database_options) as ledger:
        done = await restored(ledger, given=given)
    rest = settings.max_stale + REST_MARGIN
    sys.stdout.write(
        f"noted as revision {done.revision}; tags that rest for {rest} s from now on:\n"
        f"  {done.rested} that rested in the dump\n"
        f"  {done.reserved} that may have been given out since the dump\n"
        f"{done.left} tags can be given to new apps meanwhile\n"
    )
    if done.last_change_ms and time.time() - done.last_change_ms / 1000 > rest:
        sys.stderr.write(
            f"{PROGRAM} restored: warning: the last change in the dump is older than {rest} s. If the dump is, too, a "
            f"tag of it may have been another app's since: before you start the servers, see that no cell is cut off "
            f"from the bus, or restart the enforcers of those that are without their cache (docs/backup.md)\n"
        )


async def _import(settings: DatabaseSettings, source: str | None) -> None:
    async with open_ledger(settings.database, settings.database_options) as ledger:
        report = await take_over(ledger, source or settings.database, settings.database_options)
    url = DatabaseURL(source or settings.database).obscure_password
    sys.stdout.write(_text(report, url))


def _text(report: Report, url: str) -> str:
    lines = [
        f"taken over from {url}, and compared:",
        f"  tags             {report.tags} ({report.new_tags} new)",
        f"  policies         {report.policies} ({report.new_policies} new)",
        f"  security groups  {report.security_groups} ({report.new_security_groups} new)",
    ]
    if report.left_out:
        lines.append("left out, since it allows nothing, or cannot be understood:")
        lines += [f"  {reason}" for reason in report.left_out]
    return "\n".join(lines) + "\n"
