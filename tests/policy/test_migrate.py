"""The schema: brought up to date by servers and commands, several at once, never backwards."""

import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.settings import load
from services.policy.commands import DatabaseSettings, main
from services.policy.migrate import CannotOpen, open_ledger, pending
from services.policy.schema import MIGRATIONS
from tests.databases import EmptyDatabase
from tests.policy.server import PolicyServer

STEPS = ["ledger-1", *(name for name, _ in MIGRATIONS)]
OPTIONS = DatabaseOptions()


def test_the_command_lists_does_and_has_nothing_to_do(
    database: EmptyDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["migrate", "--database", database.url]
    for command, printed in (
        ([*arguments, "--dry-run"], "\n".join(STEPS)),
        ([*arguments, "--dry-run"], "\n".join(STEPS)),
        (arguments, "\n".join(STEPS)),
        (arguments, "the schema is up to date"),
        ([*arguments, "--dry-run"], "the schema is up to date"),
    ):
        assert main(command) == 0
        assert capsys.readouterr().out == f"{printed}\n"


async def test_commands_and_servers_at_once(database: EmptyDatabase, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "policy", "migrate", "--database", database.url]
    with ExitStack() as stack:
        servers = []
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            servers.append(PolicyServer(folder, database=database.url))
            stack.callback(servers[-1].close)
        commands = [await asyncio.create_subprocess_exec(*command) for _ in range(3)]
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in servers))
        assert [await process.wait() for process in commands] == [0, 0, 0]
    assert await pending(database.url, OPTIONS) == []
    async with open_database(database.url) as opened:
        rows = await opened.fetch_all("SELECT name FROM table_head")
        assert sorted(row["name"] for row in rows) == ["policies", "security_groups"]


async def test_a_schema_newer_than_the_program_is_refused(
    database: EmptyDatabase, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async with open_ledger(database.url, OPTIONS) as ledger:
        # Another table's series is none of our business.
        await ledger.database.execute("INSERT INTO migration (id) VALUES ('lease-7')")
        assert await pending(database.url, OPTIONS) == []
        await ledger.database.execute("INSERT INTO migration (id) VALUES ('policy-99')")
    text = "the schema is newer than this program, which does not know policy-99: upgrade the program"
    with pytest.raises(CannotOpen, match=text):
        await pending(database.url, OPTIONS)
    assert await asyncio.to_thread(main, ["migrate", "--database", database.url]) == 1
    assert text in capsys.readouterr().err
    server = PolicyServer(tmp_path, database=database.url)
    with pytest.raises(AssertionError):
        await asyncio.to_thread(server.start)
    server.close()
    assert text in server.log
    assert "Traceback" not in server.log


def test_the_servers_own_file_of_settings_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "policy-server.json"
    config.write_text(f'{{"database": "sqlite:///{tmp_path}/p.db", "listen": "127.0.0.1:4002", "auth": "uaa-keys"}}')
    assert main(["migrate", "--config", str(config)]) == 0
    assert (tmp_path / "p.db").exists()
    assert main(["migrate", "--config", str(tmp_path / "none.json")]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"SILKBUS_DATABASE_TLS": "yes"}, "database_tls: 'yes' is not one of off, encrypt, verify-ca, verify"),
        ({"SILKBUS_DATABASE_CA": "/x"}, "database_ca: is of no use with database_tls 'off'"),
        ({"SILKBUS_DATABASE_STATEMENT_TIMEOUT": "0"}, "database_statement_timeout: must be more than 0"),
        ({"SILKBUS_DATABASE_CONNECTIONS": "1"}, "database_connections: must be at least 2"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, str], text: str) -> None:
    with pytest.raises(Exception, match=text):
        load(DatabaseSettings, None, settings)


def test_a_database_that_is_not_there_is_named_without_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("postgresql", "mysql"):
        assert main(["migrate", "--database", f"{kind}://me:geheim@127.0.0.1:9/x"]) == 1
        error = capsys.readouterr().err
        assert f"database {kind}://me:********@127.0.0.1:9/x: " in error
        assert "geheim" not in error
    assert main(["migrate", "--database", "oracle://x/y"]) == 1
    assert "no kind 'oracle'; use sqlite:///FILE" in capsys.readouterr().err
