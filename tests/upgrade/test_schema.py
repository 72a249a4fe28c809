"""Two versions of a schema: the version before goes on, on a database that the present one has migrated, and back."""

import asyncio
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy
from sqlalchemy.schema import CreateIndex

from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.ledger import Ledger
from services.policy import migrate as policy_database
from services.policy.schema import MIGRATIONS as POLICY_STEPS
from services.policy.store import entries as policy_entries
from services.silk import migrate as lease_database
from services.silk.schema import MIGRATIONS as LEASE_STEPS
from tests.databases import EmptyDatabase, database, mariadb, postgresql
from tests.policy.server import POLICIES, PolicyServer, body, policy
from tests.upgrade import recorded

__all__ = ["database", "mariadb", "postgresql"]

OPTIONS = DatabaseOptions()
Opened = Callable[..., AbstractAsyncContextManager[Ledger]]
each_series = pytest.mark.parametrize(
    ("series", "opened"), [("policy", policy_database.open_ledger), ("lease", lease_database.open_ledger)]
)


@each_series
async def test_a_server_of_the_version_before_goes_on_while_and_after_the_next_migrates(
    series: str, opened: Opened, tmp_path: Path
) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    for path in (old, new):
        recorded.database(series, path)
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        wanted = recorded.run_statements(series, connection)

    done, rounds, problems = threading.Event(), [0], list[Exception]()

    def go_on() -> None:
        with closing(sqlite3.connect(new, isolation_level=None, timeout=60)) as connection:
            while not done.is_set() or not rounds[0]:
                try:
                    recorded.run_statements(series, connection, commit=False)
                except sqlite3.Error as error:
                    problems.append(error)
                    return
                rounds[0] += 1

    server = threading.Thread(target=go_on)
    server.start()
    try:
        while not rounds[0] and not problems:
            await asyncio.sleep(0.01)
        async with opened(f"sqlite:///{new}", OPTIONS):
            pass
    finally:
        done.set()
        await asyncio.to_thread(server.join)
    assert problems == []
    with closing(sqlite3.connect(new, isolation_level=None)) as connection:
        assert recorded.run_statements(series, connection) == wanted


async def test_what_the_version_before_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.db"
    recorded.database("policy", path)
    async with policy_database.open_ledger(f"sqlite:///{path}", OPTIONS) as ledger:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            recorded.run_statements("policy", connection)
        async with ledger.database.connection() as reading:
            found = await policy_entries(reading)
    sources = {key[1:] for key in found if key[0] == "policy"}
    assert sources == {("db", "web"), ("db", "new"), ("api", "web")}


async def test_leases_of_the_version_before_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "lease.db"
    recorded.database("lease", path)
    async with lease_database.open_ledger(f"sqlite:///{path}", OPTIONS) as ledger:
        rows = await ledger.database.fetch_all("SELECT cell, subnet, expires_in FROM leases")
    assert [(row["cell"], row["subnet"], row["expires_in"]) for row in rows] == [("cell-1", "10.255.1.0/24", None)]


NEXT = (
    "ALTER TABLE silkbus_policies ADD COLUMN note VARCHAR(255)",
    "CREATE TABLE silkbus_notes (id INTEGER PRIMARY KEY)",
    "INSERT INTO migration (id) VALUES ('policy-99')",
)
"""What the next version may do to the schema."""


@asynccontextmanager
async def migrated_by_the_next(database: EmptyDatabase) -> AsyncIterator[None]:
    async with policy_database.open_ledger(database.url, OPTIONS):
        pass
    async with open_database(database.url, OPTIONS) as opened:
        for statement in NEXT:
            await opened.execute(statement)
    yield


async def test_going_back(database: EmptyDatabase, tmp_path: Path) -> None:
    """The next version migrated, and was taken back: the present one serves when it is told to."""
    async with migrated_by_the_next(database):
        server = PolicyServer(tmp_path, database=database.url, database_newer_schema="true")
        try:
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(_changes, server)
            assert "the schema is newer than this program; going on with it" in server.log
            assert server.stop() == 0
        finally:
            server.close()


def _changes(server: PolicyServer) -> None:
    with server.client() as api:
        for method, kept in ((POLICIES, ["db", "cache"]), (f"{POLICIES}/delete", ["cache"])):
            sent = body(policy("web", "db"), *([policy("web", "cache")] if len(kept) == 2 else []))
            assert api.post(method, json=sent).status_code == 200
            listed = api.get(POLICIES).json()["policies"]
            assert [each["destination"]["id"] for each in listed] == kept
        assert httpx.get(f"{server.url}/readyz", timeout=10).status_code == 200


@pytest.mark.parametrize(("name", "statement"), [(n, s) for n, all_ in [*POLICY_STEPS, *LEASE_STEPS] for s in all_])
def test_steps_only_add(name: str, statement: Any) -> None:
    """What a step may be, so that the version before does not notice: another would be the end of going back."""
    if isinstance(statement, sqlalchemy.Table | CreateIndex):
        return
    column = re.fullmatch(r"ALTER TABLE \w+ ADD COLUMN \w+ [\w()]+(?P<rest>.*)", statement)
    if column is None:
        assert statement.startswith("INSERT INTO "), f"{name}: {statement}"
    else:
        # The version before does not name the column when it inserts.
        assert "NOT NULL" not in column["rest"] or "DEFAULT" in column["rest"], f"{name}: {statement}"
