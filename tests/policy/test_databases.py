"""The policy server on each kind of database: several servers at once, killed ones, a database that goes away, TLS."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bus.certificates import Authority
from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.ledger import Ledger
from bus.messages import AppId, Policy, Ports, Protocol, Revision
from bus.tables.table import Content
from bus.wire import unpack
from services.policy.migrate import CannotOpen, open_ledger
from services.policy.schema import MIGRATIONS
from services.policy.store import Filter, QuotaExceeded, Store, entries
from services.policy.tag_pool import TagPool, TagsExhausted
from tests.databases import EmptyDatabase, MariaDB, PostgreSQL, Server, running
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer, body, policy
from tests.policy.test_store import APPS, PORTS, TAGS, Model, bench_on, between

SERVERS = pytest.mark.parametrize("kind", [PostgreSQL, MariaDB])
HEADERS = {"Authorization": f"bearer {ADMIN_TOKEN}"}


@contextmanager
def policy_servers(folder: Path, url: str, count: int, **settings: object) -> Iterator[Sequence[PolicyServer]]:
    with ExitStack() as stack:
        servers = []
        for number in range(count):
            own = folder / f"server{number}"
            own.mkdir()
            server = PolicyServer(own, database=url, **settings)
            stack.callback(server.close)
            servers.append(server)
        yield servers


@asynccontextmanager
async def ledger_of(url: str) -> AsyncIterator[Ledger]:
    async with open_database(url) as database:
        yield Ledger(database, "policies")


async def assert_sound(url: str, revision: int) -> dict[tuple[str, ...], Any]:
    """Head, log and rows agree; each app in a policy has a tag of its own, and no other app has one. The table."""
    async with ledger_of(url) as ledger:
        content, _ = await ledger.content(entries)
        assert content.revision == revision
        replay = Content.of(content.epoch, Revision(0), {})
        while replay.revision < revision:
            for entry in await ledger.log_from(Revision(replay.revision + 1)):
                assert entry.revision == replay.revision + 1
                replay.apply(entry.revision, entry.changes)
        assert replay.digest == content.digest
        table = {key: unpack(data, "table") for key, data in content.entries.items()}
        tags = {key[1]: tag for key, tag in table.items() if key[0] == "tag"}
        assert len(set(tags.values())) == len(tags)
        assert set(tags) == {app for key in table if key[0] == "policy" for app in key[1:]}
        rows = await ledger.database.fetch_all("SELECT source, destination, start_port FROM silkbus_policies")
        assert len({tuple(row[name] for name in ("source", "destination", "start_port")) for row in rows}) == len(rows)
        return table


async def test_a_long_random_history_equals_the_model(database: EmptyDatabase) -> None:
    chance = random.Random(7)  # noqa: S311
    async with bench_on(database.url, highest=TAGS) as it:
        model = Model()
        for _ in range(120):
            it.now[0] += chance.choice([0.0, 0.4, 60.0, 101.0])
            it.ledger.fail_next = chance.random() < 0.2
            wanted = [
                Policy(chance.choice(APPS), chance.choice(APPS), chance.choice(PORTS))
                for _ in range(chance.randint(1, 3))
            ]
            verb = chance.choice(["create", "delete"])
            if verb == "delete":
                wanted += [item for item in model.policies if item.source == wanted[0].source]
            try:
                await getattr(it.store, verb)(wanted, actor="x")
            except TagsExhausted:
                pass
            else:
                getattr(model, verb)(wanted)
            it.ledger.fail_next = False
            assert await it.store.list(Filter()) == model.policies
            tags = {AppId(key[1]): tag for key, tag in (await it.table()).items() if key[0] == "tag"}
            model.check_tags(tags, it.now[0])
            some = set(chance.sample(APPS, 2))
            both = Filter(sources=some, destinations=some)
            for filter_ in (Filter(either=some), Filter(sources=some), Filter(destinations=some), both):
                assert await it.store.list(filter_) == [item for item in model.policies if filter_.matches(item)]


async def test_names_are_compared_byte_for_byte_and_kept(database: EmptyDatabase) -> None:
    odd = ["a", "A", "ä", "漢字😀", "it's", 'say "hi"', "back\\slash", "%s :rows {0} ?", "$[0]", "x" * 255, "a  b"]
    wanted = [between(name, "a", 1 + number) for number, name in enumerate(odd)]
    async with bench_on(database.url) as it:
        await it.store.create(wanted, actor="x")
        assert await it.store.list(Filter()) == wanted
        for item in wanted:
            assert await it.store.list(Filter(sources={item.source})) == [item]
        assert {key[1] for key in await it.table() if key[0] == "tag"} == set(odd)
        await it.store.delete(wanted[1:], actor="x")
        assert await it.store.list(Filter()) == wanted[:1]


async def test_long_requests_are_one_change_and_do_not_stop_the_loop(database: EmptyDatabase) -> None:
    wanted = [between(f"{i % 700:036}", f"{i:036}", 1 + i % 3) for i in range(10_000)]
    async with bench_on(database.url) as it:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        assert await it.store.create(wanted, actor="x") == 1
        assert turns > 50
        assert await it.store.list(Filter()) == wanted
        assert await it.store.create(wanted, actor="x") == 1
        assert await it.store.delete(wanted, actor="x") == 2
        counting.cancel()
        assert await it.table() == {}
        assert len((await it.ledger.log_from(Revision(1)))[0].events) == 10_000


async def test_the_quota_holds_under_parallel_requests(database: EmptyDatabase) -> None:
    async with bench_on(database.url) as one, bench_on(database.url) as two:
        asked = [
            store.create([between("a", f"b{number}")], actor="x", quota=10)
            for number in range(20)
            for store in (one.store, two.store)
        ]
        results = await asyncio.gather(*asked, return_exceptions=True)
        refused = [result for result in results if isinstance(result, QuotaExceeded)]
        assert [result for result in results if not isinstance(result, (int, QuotaExceeded))] == []
        assert len(await one.store.list(Filter())) == 10
        assert refused


async def test_two_servers_and_hundreds_of_parallel_requests(database: EmptyDatabase, tmp_path: Path) -> None:
    """Each adds policies of its own, takes half away again, and both at once add and take away the same ones."""
    with policy_servers(tmp_path, database.url, 2) as servers:
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in servers))  # both migrate
        revisions: list[int] = []
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(headers=HEADERS, timeout=300, limits=limits) as client:

            async def post(server: PolicyServer, path: str, *policies: Any) -> None:
                answer = await client.post(server.url + path, json=body(*policies))
                assert answer.status_code == 200, answer.text
                revisions.append(int(answer.headers["X-Silkbus-Revision"]))

            async def own(number: int) -> None:
                server = servers[number % 2]
                mine = [policy(f"app{number}", f"app{(number + k) % 150}", 1000 + k) for k in range(1, 5)]
                await post(server, POLICIES, *mine)
                await post(servers[(number + 1) % 2], DELETE, *mine[:2])

            async def shared(number: int) -> None:
                same = policy("shared", f"target{number % 10}")
                await asyncio.gather(*(post(server, POLICIES, same) for server in servers))
                await asyncio.gather(*(post(server, DELETE, same) for server in servers))

            await asyncio.gather(*(own(number) for number in range(150)), *(shared(number) for number in range(25)))
            lists = [(await client.get(server.url + POLICIES)).json() for server in servers]
        assert lists[0] == lists[1]
        kept = {
            (item["source"]["id"], item["destination"]["id"], item["destination"]["ports"]["start"])
            for item in lists[0]["policies"]
        }
        expected = {(f"app{n}", f"app{(n + k) % 150}", 1000 + k) for n in range(150) for k in (3, 4)}
        assert kept == expected
        assert lists[0]["total_policies"] == len(expected)
        table = await assert_sound(database.url, max(revisions))
        assert sum(len(value) for key, value in table.items() if key[0] == "policy") == len(expected)


@pytest.mark.parametrize(
    ("failpoint", "kept"),
    [("policy.before-commit", False), ("policy.after-commit", True), ("policy.after-publish", True)],
)
async def test_a_server_killed_beside_another_loses_nothing_accepted(
    database: EmptyDatabase, tmp_path: Path, failpoint: str, kept: bool
) -> None:
    with policy_servers(tmp_path, database.url, 2) as (dying, living):
        await asyncio.to_thread(living.start)
        await asyncio.to_thread(dying.start, f"{failpoint}=kill:5")
        accepted: dict[str, int] = {}
        async with httpx.AsyncClient(headers=HEADERS, timeout=120) as client:

            async def create(server: PolicyServer, name: str) -> None:
                try:
                    answer = await client.post(server.url + POLICIES, json=body(policy(name, "b")))
                except httpx.HTTPError:
                    assert server is dying
                    return
                assert answer.status_code == 200, answer.text
                accepted[name] = int(answer.headers["X-Silkbus-Revision"])

            await asyncio.gather(
                *(create(server, f"{number}-{server.url}") for number in range(40) for server in (dying, living))
            )
            await asyncio.to_thread(dying.wait_killed)
            before = (await client.get(living.url + POLICIES)).json()
            there = {item["source"]["id"] for item in before["policies"]}
            assert set(accepted) <= there
            assert len(there) == before["total_policies"]
            assert len(accepted) == 40 + 4
            assert len(there) == len(accepted) + kept
            await assert_sound(database.url, len(there))

            await asyncio.to_thread(dying.start)  # and it goes on
            again = await client.post(dying.url + POLICIES, json=body(*(policy(name, "b") for name in there)))
            assert int(again.headers["X-Silkbus-Revision"]) == len(there), "nothing is new"


@SERVERS
async def test_a_database_restarted_is_a_quick_503_and_then_all_is_well(kind: type[Server], tmp_path: Path) -> None:
    with running(kind) as database_server:
        database_server.sql("CREATE DATABASE silkbus")
        with policy_servers(tmp_path, database_server.url("silkbus"), 1, database_statement_timeout=5) as (server,):
            await asyncio.to_thread(server.start)
            async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=60) as client:
                assert (await client.post(POLICIES, json=body(policy("a", "b")))).status_code == 200
                await asyncio.gather(*(client.get(POLICIES) for _ in range(8)))  # the pool has some connections
                database_server.kill()
                started = time.monotonic()
                answers = await asyncio.gather(
                    *(client.post(POLICIES, json=body(policy("a", f"c{n}"))) for n in range(10)),
                    *(client.get(POLICIES) for _ in range(3)),
                    client.get("/networking/v1/external/history"),
                )
                assert time.monotonic() - started < 14, "slower than a client waits"
                assert {answer.status_code for answer in answers} == {503}
                text = "database create failed: the database does not answer; try again shortly"
                assert answers[0].json()["error"].startswith(text)
                assert answers[0].headers["Retry-After"]
                assert (await client.get("/health")).status_code == 500
                assert (await client.get("/livez")).status_code == 200
                database_server.launch()
                await asyncio.to_thread(database_server.wait_ready)
                answer = await client.post(POLICIES, json=body(policy("a", "d")))
                assert (answer.status_code, answer.headers["X-Silkbus-Revision"]) == (200, "2")
                assert (await client.get(POLICIES)).json()["total_policies"] == 2
                assert (await client.get("/health")).status_code == 200


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


@SERVERS
async def test_a_database_that_hangs_is_a_503_in_time(kind: type[Server], tmp_path: Path) -> None:
    with running(kind) as database_server:
        database_server.sql("CREATE DATABASE silkbus")
        settings = {"database_statement_timeout": 2, "database_connect_timeout": 2}
        with policy_servers(tmp_path, database_server.url("silkbus"), 1, **settings) as (server,):
            await asyncio.to_thread(server.start)
            async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=60) as client:
                assert (await client.post(POLICIES, json=body(policy("a", "b")))).status_code == 200
                assert database_server._process is not None
                frozen = family(database_server._process.pid)
                for pid in frozen:
                    os.kill(pid, signal.SIGSTOP)
                try:
                    started = time.monotonic()
                    answers = await asyncio.gather(
                        *(client.post(POLICIES, json=body(policy("a", f"c{n}"))) for n in range(5)),
                        *(client.get(POLICIES) for _ in range(20)),
                    )
                    assert time.monotonic() - started < 20
                    assert {answer.status_code for answer in answers} == {503}
                finally:
                    for pid in frozen:
                        os.kill(pid, signal.SIGCONT)
                answer = await client.post(POLICIES, json=body(policy("a", "d")))
                assert answer.status_code == 200, answer.text
                assert (await client.get(POLICIES)).status_code == 200


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"), "database-ca")
    made.ensure()
    return made


def with_tls(kind: type[Server], authority: Authority, name: str) -> type[Server]:
    """A kind of server that has a certificate for `name`."""

    class WithTls(kind):  # type: ignore[valid-type, misc]
        def _command(self) -> Sequence[str]:
            certificate, key = self.folder / "server.crt", self.folder / "server.key"
            if not key.exists():
                authority.issue(certificate, key, names=[name], usage="serverAuth")
                for file in (certificate, key):
                    os.chown(file, self.folder.stat().st_uid, self.folder.stat().st_gid)
            command: list[str] = [*super()._command()]
            if kind is PostgreSQL:
                return [*command, "-c", "ssl=on", "-c", f"ssl_cert_file={certificate}", "-c", f"ssl_key_file={key}"]
            return [*command, f"--ssl-cert={certificate}", f"--ssl-key={key}"]

    return WithTls


async def encrypted(url: str, kind: type[Server], options: DatabaseOptions) -> bool:
    """Whether the server says that our connection to it is."""
    async with open_ledger(url, options) as ledger:
        if kind is PostgreSQL:
            query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            return bool(await ledger.database.fetch_val(query))
        row = await ledger.database.fetch_one("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
        return bool(row and row[1])


@SERVERS
async def test_tls(kind: type[Server], authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path, "another-ca")
    other.ensure()
    ca = authority.certificate
    with running(with_tls(kind, authority, "IP:127.0.0.1")) as server:
        server.sql("CREATE DATABASE silkbus")
        url = server.url("silkbus")
        assert not await encrypted(url, kind, DatabaseOptions())
        for options in (
            DatabaseOptions(tls="encrypt"),
            DatabaseOptions(tls="verify-ca", ca=ca),
            DatabaseOptions(tls="verify", ca=ca),
        ):
            assert await encrypted(url, kind, options), options
        for tls in ("verify-ca", "verify"):
            with pytest.raises(CannotOpen, match=r"(?i)certificate verify failed"):
                await encrypted(url, kind, DatabaseOptions(tls=tls, ca=other.certificate))
        with pytest.raises(CannotOpen, match="not a readable PEM file"):
            await encrypted(url, kind, DatabaseOptions(tls="verify", ca=tmp_path / "none.pem"))
    with running(with_tls(kind, authority, "DNS:db.example")) as server:
        server.sql("CREATE DATABASE silkbus")
        url = server.url("silkbus")
        assert await encrypted(url, kind, DatabaseOptions(tls="verify-ca", ca=ca))
        with pytest.raises(CannotOpen, match=r"127\.0\.0\.1"):
            await encrypted(url, kind, DatabaseOptions(tls="verify", ca=ca))


@pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)
async def test_a_server_without_tls_is_refused_where_tls_is_asked_for(database: EmptyDatabase) -> None:
    with pytest.raises(CannotOpen, match=r"TLS|SSL"):
        async with open_ledger(database.url, DatabaseOptions(tls="encrypt")):
            pass


async def test_the_log_of_a_store_is_kept_with_the_tags_type(database: EmptyDatabase) -> None:
    async with open_ledger(database.url, DatabaseOptions()) as ledger:
        assert await ledger.pending(MIGRATIONS) == []
        store = Store(ledger, TagPool(rest=0, clock=time.time), lambda _: None)
        await store.create([Policy(AppId("a"), AppId("b"), Ports(Protocol.TCP, 1, 1))], actor="x")
        assert await store.tags() == [("a", 1, "app"), ("b", 2, "app")]
