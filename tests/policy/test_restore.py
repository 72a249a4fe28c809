"""Backup and restore as docs/backup.md has it: the databases' own tools, a server, the bus, and replicas of cells."""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bus.connection import connect
from bus.database import open_database
from bus.messages import MAX_TAG
from bus.tables import POLICIES as TABLE
from bus.tables import Replica
from services.policy.commands import main
from services.policy.store import entries
from services.policy.tag_pool import REST_MARGIN, TagPool, TagsExhausted
from tests.databases import EmptyDatabase
from tests.nats_server import NatsServer
from tests.policy.server import DELETE, POLICIES, PolicyServer, body, policy
from tests.policy.test_store import bench_on, between

SECONDS = 40
REST = 604_800 + REST_MARGIN


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path, "-js", "-sd", str(tmp_path / "jetstream"))
    server.start()
    yield server
    server.stop()


class Copy:
    """A dump of a database, by the tools and with the options that docs/backup.md names."""

    def __init__(self, database: EmptyDatabase, file: Path) -> None:
        self.database, self.file = database, file
        self.url = database.url
        self.port = str(urlsplit(database.url).port or "")

    def dump(self) -> None:
        match self.database.kind:
            case "sqlite":
                run("sqlite3", self._path, f".backup {self.file}")
            case "postgresql":
                run("pg_dump", "--format=custom", f"--file={self.file}", self.url)
            case "mysql":
                run("mariadb-dump", *self._mariadb, "--single-transaction", f"--result-file={self.file}", self._name)

    def restore(self) -> None:
        match self.database.kind:
            case "sqlite":
                for old in Path(self._path).parent.glob(f"{Path(self._path).name}*"):
                    old.unlink()
                run("cp", str(self.file), self._path)
            case "postgresql":
                options = ["--clean", "--if-exists", "--single-transaction", f"--dbname={self.url}"]
                run("pg_restore", *options, str(self.file))
            case "mysql":
                run("mariadb", *self._mariadb, self._name, f"--execute=source {self.file}")

    @property
    def _path(self) -> str:
        return self.url.removeprefix("sqlite:///")

    @property
    def _name(self) -> str:
        return self.database.name

    @property
    def _mariadb(self) -> list[str]:
        return ["--no-defaults", "--protocol=tcp", "--host=127.0.0.1", f"--port={self.port}", "--user=silkbus"]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (command, done.stderr)


@asynccontextmanager
async def replica(nats: NatsServer, name: str, cache: Path) -> AsyncIterator[Replica[Any]]:
    async with connect(nats.url, role="cell", name=name) as connection:
        following = Replica(connection, TABLE, cache=cache)
        task = asyncio.create_task(following.run())
        try:
            yield following
        finally:
            task.cancel()
            await asyncio.wait({task})


async def in_sql(database: EmptyDatabase) -> dict[tuple[str, ...], Any]:
    async with open_database(database.url) as opened, opened.connection() as connection:
        found = await entries(connection)
    return {key: TABLE.decode(key, value) for key, value in found.items()}


async def follows(replicas: list[Replica[Any]], database: EmptyDatabase) -> None:
    """Wait until the replicas are live and hold just what SQL holds."""
    wanted = await in_sql(database)
    deadline = time.monotonic() + SECONDS
    while not all(one.state == "live" and one.entries == wanted for one in replicas):
        assert time.monotonic() < deadline, [(one.state, one.revision, one.entries, wanted) for one in replicas]
        await asyncio.sleep(0.05)


def change(server: PolicyServer, path: str, *policies: Any) -> None:
    with server.client() as api:
        api.post(path, json=body(*policies)).raise_for_status()


def tags(server: PolicyServer) -> dict[str, str]:
    with server.client() as api:
        return {item["id"]: item["tag"] for item in api.get("/networking/v1/external/tags").json()["tags"]}


def history(server: PolicyServer) -> list[Any]:
    with server.client() as api:
        found: list[Any] = api.get("/networking/v1/external/history").json()["history"]
    return found


async def events(nats: NatsServer) -> list[tuple[str, str | None, str]]:
    """Id, previous id and policy of each event of the stream, in order."""
    found = []
    async with connect(nats.url, role="reader", name="reader") as connection:
        assert await connection.wait_connected(SECONDS)
        stream = connection.jetstream(5)
        last = (await stream.stream_info("SILKBUS_POLICIES")).state.last_seq
        for number in range(1, last + 1):
            headers = (await stream.get_msg("SILKBUS_POLICIES", number)).headers or {}
            found.append((headers["ce-id"], headers.get("ce-previous"), headers["ce-subject"]))
    return found


@pytest.mark.parametrize("more", [0, 1, 6], ids=["lower", "equal", "higher"])
async def test_a_restored_database_is_followed_and_no_tag_changes_its_meaning(
    database: EmptyDatabase, nats: NatsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: int
) -> None:
    server = PolicyServer(tmp_path, nats=nats.url, database=database.url)
    copy = Copy(database, tmp_path / "copy")
    try:
        await asyncio.to_thread(server.start)
        change(server, POLICIES, policy("a", "b"), policy("gone", "b"))
        change(server, DELETE, policy("gone", "b"))
        async with replica(nats, "one", tmp_path / "one.table") as one:
            await follows([one], database)
            async with replica(nats, "two", tmp_path / "two.table") as two:
                copy.dump()  # at revision 2, with the server at work
                dumped = await in_sql(database)
                change(server, POLICIES, policy("lost", "b"), policy("a", "b", 9))
                change(server, DELETE, policy("a", "b"))
                change(server, POLICIES, policy("gone", "b"))
                await follows([one, two], database)
            lost, lost_history = tags(server), history(server)
            assert server.stop() == 0
            copy.restore()
            assert await in_sql(database) == dumped
            assert await asyncio.to_thread(main, ["restored", "--database", database.url]) == 0
            assert "noted as revision 3" in capsys.readouterr().out
            assert one.entries != dumped, "a cell goes on with what it last heard"
            await asyncio.to_thread(server.start)
            for number in range(more):
                change(server, POLICIES, policy(f"new-{number}", "b"))
            async with replica(nats, "two", tmp_path / "two.table") as two:  # from what it kept on disk
                await follows([one, two], database)
                assert {key: one.entries[key] for key in dumped} == dumped
                change(server, POLICIES, policy("late", "b"))
                await follows([one, two], database)
        given = tags(server)
        assert {app: given[app] for app in ("a", "b")} == {app: lost[app] for app in ("a", "b")}
        fresh = {given[app] for app in given if app not in ("a", "b")}
        assert not fresh & set(lost.values())
        assert len(fresh) == more + 1

        noted = next(entry for entry in history(server) if entry["user"] == "silkbus policy restored")
        assert noted["time"] >= max(entry["time"] for entry in lost_history)
        deadline = time.monotonic() + SECONDS
        while (told := await events(nats))[-1][2] != "policy/b/late":
            assert time.monotonic() < deadline, told
            await asyncio.sleep(0.2)
        ids = [identity for identity, _, _ in told]
        assert len(ids) == len(set(ids)), "none twice"
        assert len(ids) == 3 + 4 + more + 1, "what was undone stays, what is in the dump is not told again"
        # The break shows: the first event after the restoring follows the dump's last one, not the stream's.
        assert told[7][1] == ids[2]
    finally:
        server.close()


async def test_what_rested_rests_anew_and_is_nobodys(database: EmptyDatabase) -> None:
    async with bench_on(database.url) as bench:
        await bench.store.create([between("a", "b", 1), between("c", "d", 1)], actor="me")
        await bench.store.delete([between("c", "d", 1)], actor="me")
    assert await asyncio.to_thread(main, ["restored", "--database", database.url, "--given", str(MAX_TAG - 4)]) == 0
    async with bench_on(database.url) as bench:
        bench.now[0] = time.time()
        with pytest.raises(TagsExhausted):  # also for their last owner: its tag may have been another's since
            await bench.store.create([between("c", "d", 1)], actor="me")
        bench.now[0] += REST + 10
        pool = TagPool(rest=REST, clock=lambda: bench.now[0])
        bench.store._tags = pool
        await bench.store.create([between("c", "d", 1)], actor="me")
        assert len(await bench.store.tags()) == 4


async def test_by_default_half_of_the_numbers_never_used_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/p.db"
    assert await asyncio.to_thread(main, ["restored", "--database", url]) == 0
    assert "  32768 that may have been given" in capsys.readouterr().out
    async with bench_on(url) as bench:
        await bench.store.create([between("a", "b", 1)], actor="me")
        assert [tag for _, tag, _ in await bench.store.tags()] == [32769, 32770]


async def test_a_dump_older_than_a_rest_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/p.db"
    async with bench_on(url) as bench:
        await bench.store.create([between("a", "b", 1)], actor="me")
        await bench.ledger.database.execute("UPDATE change_log SET changed_at_ms = 1000")
    assert await asyncio.to_thread(main, ["restored", "--database", url]) == 0
    assert "warning: the last change in the dump is older than 608400 s" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["restored", "--database", url]) == 0
    assert capsys.readouterr().err == ""
