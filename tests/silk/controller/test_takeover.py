"""Taking over the original's leases: from its own database, in place or from elsewhere, and its configuration file."""

import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from databases import Database

from bus.database import open_database
from bus.database_options import DatabaseOptions
from bus.legacy_config import CannotUse
from services.silk import legacy_config
from services.silk.leases import LeaseStore, Terms
from services.silk.migrate import open_ledger
from services.silk.pool import Kind, Pool
from services.silk.takeover import CannotTakeOver, take_over, take_over_at_start
from tests.databases import EmptyDatabase, Server
from tests.silk.controller.conftest import OVERLAY, cell, table
from tests.silk.controller.process import NOWHERE, ControllerProcess

WEEK = 7 * 86_400
TERMS = Terms(Pool((OVERLAY,), 24), WEEK)
OPTIONS = DatabaseOptions()
HAVE_SERVERS = pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)
TABLE = """
CREATE TABLE subnets (id IDENTITY, underlay_ip varchar(15) NOT NULL, overlay_subnet varchar(18) NOT NULL,
    overlay_hwaddr varchar(17) NOT NULL, last_renewed_at bigint NOT NULL,
    UNIQUE (underlay_ip), UNIQUE (overlay_subnet), UNIQUE (overlay_hwaddr))
"""
ROWS = [
    ("10.0.0.5", "10.255.17.0/24", "ee:ee:0a:ff:11:00", 10),
    ("10.0.0.6", "10.255.0.9/32", "ee:ee:0a:ff:00:09", 20),
    ("10.0.0.7", "10.255.18.0/24", "ee:ee:0a:ff:12:00", WEEK + 60),
    ("10.0.0.8", "10.12.1.0/24", "ee:ee:0a:0c:01:00", 10),
    ("10.0.0.9", "10.255.19.0/24", "ee:ee:0a:ff:99:00", 10),
    ("banana", "10.255.20.0/24", "ee:ee:0a:ff:14:00", 10),
]
"""Underlay, subnet, MAC, and seconds since it was renewed (contract/cell.md 4.4, 4.5): two good ones, four not."""


@asynccontextmanager
async def original(database: EmptyDatabase) -> AsyncIterator[Database]:
    """The original's database, with these leases."""
    async with open_database(database.url) as opened:
        identity = "int NOT NULL AUTO_INCREMENT PRIMARY KEY" if database.kind == "mysql" else "SERIAL PRIMARY KEY"
        await opened.execute(TABLE.replace("IDENTITY", identity))
        await opened.execute("CREATE TABLE gorp_migrations (id varchar(255) PRIMARY KEY, applied_at timestamp)")
        for underlay, subnet, mac, age in ROWS:
            values = {"underlay": underlay, "subnet": subnet, "mac": mac, "at": int(time.time()) - age}
            await opened.execute(
                "INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at)"
                " VALUES (:underlay, :subnet, :mac, :at)",
                values,
            )
        yield opened


async def content(database: Database) -> list[Any]:
    return [tuple(dict(row).values()) for row in await database.fetch_all("SELECT * FROM subnets ORDER BY id")]


@HAVE_SERVERS
@pytest.mark.parametrize("in_place", [True, False])
async def test_cells_keep_their_subnets(database: EmptyDatabase, in_place: bool, tmp_path: Path) -> None:
    ours = database.url if in_place else f"sqlite:///{tmp_path}/silk.db"
    async with original(database) as source, open_ledger(ours, OPTIONS) as ledger:
        before = await content(source)
        report = await take_over(ledger, database.url, TERMS, OPTIONS)
        assert [(str(lease.subnet), lease.cell) for lease in report.added] == [
            ("10.255.17.0/24", "ip-10-0-0-5"),
            ("10.255.0.9/32", "ip-10-0-0-6"),
        ]
        assert sorted(report.left_out)[0].startswith("10.12.1.0/24 of 10.0.0.8: none of the pool 10.255.0.0/16")
        assert [why.split(":")[0] for why in sorted(report.left_out)] == [
            "10.12.1.0/24 of 10.0.0.8",
            "10.255.18.0/24 of 10.0.0.7",
            "10.255.19.0/24 of 10.0.0.9",
            "10.255.20.0/24 of banana",
        ]
        store = LeaseStore(ledger, TERMS)
        assert await store.all() == sorted(report.added, key=lambda lease: lease.subnet)
        named = (await store.acquire(cell(5)[0], report.added[0].underlay)).result
        assert named is not None
        assert (named.cell, named.subnet) == ("cell-5", report.added[0].subnet)
        again = await take_over(ledger, database.url, TERMS, OPTIONS)
        assert (again.added, again.present) == ([], 2)
        assert len(await table(store)) == 2
        assert await content(source) == before


@HAVE_SERVERS
async def test_what_others_have_meanwhile_is_left_out(database: EmptyDatabase) -> None:
    async with original(database), open_ledger(database.url, OPTIONS) as ledger:
        store = LeaseStore(ledger, TERMS)
        other = (await store.acquire(*cell(1), had=TERMS.pool.subnet(Kind.BLOCK, 0x0AFF1100))).result
        assert other is not None
        await store.acquire_at(cell(6)[1])
        report = await take_over(ledger, database.url, TERMS, OPTIONS)
        assert report.added == []
        assert "10.255.17.0/24 of 10.0.0.5: cell-1 has 10.255.17.0/24 here" in report.left_out
        assert "10.255.0.9/32 of 10.0.0.6: that cell, ip-10-0-0-6, has 10.255.1.0/24 here" in report.left_out


@HAVE_SERVERS
async def test_a_controller_does_it_by_itself_in_the_same_database_once(database: EmptyDatabase) -> None:
    async with original(database) as source, open_ledger(database.url, OPTIONS) as ledger:
        await take_over_at_start(ledger, TERMS)
        store = LeaseStore(ledger, TERMS)
        held = await store.all()
        assert len(held) == 2
        for lease in held:
            await store.release(lease)
        await take_over_at_start(ledger, TERMS)
        assert await store.all() == []
        assert len(await content(source)) == len(ROWS)


async def test_what_is_not_the_originals_is_named(database: EmptyDatabase) -> None:
    async with open_ledger(database.url, OPTIONS) as ledger:
        await take_over_at_start(ledger, TERMS)
        assert (await ledger.head())[1] == 0
        with pytest.raises(CannotTakeOver, match="has no table subnets as the original's controller makes it"):
            await take_over(ledger, database.url, TERMS, OPTIONS)


def silkbus(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).with_name("silkbus")), "silk", *arguments]
    environment = {f"SILKBUS_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        program, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_by_command_and_what_an_operator_sees(database: EmptyDatabase, tmp_path: Path) -> None:
    ours = ("--database", f"sqlite:///{tmp_path}/silk.db")
    assert silkbus("migrate", "--dry-run", *ours).stdout == "ledger-1\nlease-1\nlease-2\nlease-3\n"
    assert silkbus("migrate", *ours).returncode == 0
    assert silkbus("migrate", *ours).stdout == "the schema is up to date\n"
    async with original(database):
        done = silkbus("import", "--from", database.url, *ours)
        assert "  2 leases taken over\n  0 were there already\n  4 left out:\n" in done.stdout
    lines = silkbus("leases", *ours).stdout.splitlines()
    assert re.fullmatch(r"10\.255\.0\.9/32 +10\.0\.0\.6 +\d+ s ago +ip-10-0-0-6", lines[1])
    outside = silkbus("leases", *ours, overlay_network="10.1.0.0/16", lease_expiry="15").stdout
    assert "ip-10-0-0-6  (outside the pool)  (expired)\n" in outside
    listed = [json.loads(line) for line in silkbus("leases", "--json", *ours).stdout.splitlines()]
    assert [lease["subnet"] for lease in listed] == ["10.255.0.9/32", "10.255.17.0/24"]
    assert json.loads(silkbus("leases", "-o", "json", *ours).stdout)[0]["subnet"] == "10.255.0.9/32"
    released = silkbus("release", "10.0.0.6", *ours)
    assert released.stdout == "10.255.0.9/32 of ip-10-0-0-6 at 10.0.0.6: released; it rests for 600 s\n"
    again = silkbus("release", "ip-10-0-0-6", *ours)
    assert (again.returncode, again.stderr.count("has no lease")) == (1, 1)
    assert silkbus("expire", *ours, lease_expiry="5").stdout == "10.255.17.0/24 of ip-10-0-0-5\n1 ended\n"
    history = [json.loads(line) for line in silkbus("history", "--json", *ours).stdout.splitlines()]
    assert [(event["event"], event["subnet"], event["by"]) for event in history] == [
        ("acquired", "10.255.17.0/24", "silkbus silk import"),
        ("acquired", "10.255.0.9/32", "silkbus silk import"),
        ("released", "10.255.0.9/32", "silkbus silk release"),
        ("expired", "10.255.17.0/24", "silkbus silk expire"),
    ]
    assert yaml.safe_load(silkbus("history", "-o", "yaml", *ours).stdout) == history
    assert len(silkbus("history", "--cell", "ip-10-0-0-5", *ours).stdout.splitlines()) == 3
    wrong = silkbus("leases", "--database", "postgresql://nobody@127.0.0.1:9/x")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("silkbus silk leases: database postgresql://nobody@127.0.0.1:9/x: ")


def rendered(**changes: Any) -> dict[str, Any]:
    """A file as BOSH renders it, with these keys changed, or absent: None."""
    content: dict[str, Any] = {
        "debug_server_port": 46455,
        "listen_host": "0.0.0.0",  # noqa: S104 (nothing listens there)
        "listen_port": 4103,
        "ca_cert_file": "/ca.crt",
        "server_cert_file": "/server.crt",
        "server_key_file": "/server.key",
        "network": "10.255.0.0/16",
        "subnet_prefix_length": 24,
        "database": {
            "type": "mysql",
            "user": "silk",
            "password": "secret",
            "host": "sql.service.cf.internal",
            "port": 3306,
            "timeout": 120,
            "database_name": "silk",
            "require_ssl": True,
            "ca_cert": "/db.crt",
            "skip_hostname_validation": False,
        },
        "lease_expiration_seconds": 604800,
        "metron_port": 3457,
        "health_check_port": 19683,
        "metrics_emit_seconds": 30,
        "staleness_threshold_seconds": 3600,
        "log_prefix": "cfnetworking",
        "max_idle_connections": 10,
        "max_open_connections": 200,
        "connections_max_lifetime_seconds": 3600,
    }
    content.update(changes)
    return {key: value for key, value in content.items() if value is not None}


def read(folder: Path, content: object) -> dict[str, str]:
    path = folder / "silk-controller.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return dict(legacy_config.read(path).environment)


def test_keys_of_the_originals_configuration_become_settings(tmp_path: Path) -> None:
    assert read(tmp_path, rendered()) == {
        "SILKBUS_LISTEN": "0.0.0.0:4103",
        "SILKBUS_DEBUG_LISTEN": "127.0.0.1:46455",
        "SILKBUS_HEALTH_CHECK_PORT": "19683",
        "SILKBUS_OVERLAY_NETWORK": "10.255.0.0/16",
        "SILKBUS_SUBNET_PREFIX_LENGTH": "24",
        "SILKBUS_LEASE_EXPIRY": "604800",
        "SILKBUS_CA_CERT_FILE": "/ca.crt",
        "SILKBUS_SERVER_CERT_FILE": "/server.crt",
        "SILKBUS_SERVER_KEY_FILE": "/server.key",
        "SILKBUS_DATABASE": "mysql://silk:secret@sql.service.cf.internal:3306/silk",
        "SILKBUS_DATABASE_CONNECT_TIMEOUT": "120",
        "SILKBUS_DATABASE_TLS": "verify",
        "SILKBUS_DATABASE_CA": "/db.crt",
        "SILKBUS_DATABASE_CONNECTIONS": "200",
        "SILKBUS_DATABASE_CONNECTION_LIFETIME": "3600",
    }


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("10.255.7.7/16", "10.255.0.0/16"),
        (["10.255.0.0/16", "10.1.0.0/17"], "10.255.0.0/16,10.1.0.0/17"),
        ("10.255.0.0/16, 10.1.0.0/17", "10.255.0.0/16,10.1.0.0/17"),
    ],
)
def test_networks(tmp_path: Path, network: object, expected: str) -> None:
    assert read(tmp_path, rendered(network=network))["SILKBUS_OVERLAY_NETWORK"] == expected


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "unmarshal config: unexpected end of JSON input"),
        (rendered(debug_server_port=0), "invalid config: DebugServerPort: less than min"),
        (
            rendered(lease_expiration_seconds=0, metron_port=None),
            "invalid config: LeaseExpirationSeconds: less than min, MetronPort: less than min",
        ),
        (rendered(max_idle_connections=-1), "invalid config: MaxIdleConnections: less than min"),
        (rendered(network="banana"), 'network: "banana" names no IPv4 network: write 10.255.0.0/16, or a list'),
        (
            rendered(database={"type": "x"}),
            "connecting to database: failed to create connection string: database type 'x' is not supported",
        ),
    ],
)
def test_fatal_errors_are_told_as_the_original_tells_them(tmp_path: Path, content: object, text: str) -> None:
    with pytest.raises(CannotUse) as error:
        read(tmp_path, content)
    line = r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d " + re.escape(f"cfnetworking.silk-controller error: {text}")
    assert re.fullmatch(line, str(error.value))


@pytest.mark.parametrize("flag", ["-config", "--config"])
def test_what_bosh_renders_is_enough(flag: str, tmp_path: Path, postgresql: Server) -> None:
    controller = ControllerProcess(tmp_path, "unused")
    postgresql.sql("DROP DATABASE IF EXISTS legacysilk WITH (FORCE)", "CREATE DATABASE legacysilk")
    database = {**rendered()["database"], "type": "postgres", "user": "silkbus", "host": "127.0.0.1"}
    config = rendered(
        listen_host="127.0.0.1",
        listen_port=controller.port,
        health_check_port=controller.health_port,
        database={**database, "port": postgresql.port, "database_name": "legacysilk", "require_ssl": False},
        network="10.255.0.0/22",
        **{name: str(controller.settings[name]) for name in ("ca_cert_file", "server_cert_file", "server_key_file")},
    )
    path = tmp_path / "silk-controller.json"
    path.write_text(json.dumps(config))
    controller.settings = {"nats": NOWHERE, "run_dir": controller.folder, "debug_listen": ""}
    try:
        controller.launch(flag, str(path))
        with controller.client() as daemon:
            controller.wait_until(lambda: daemon.get("/leases").content == b'{"leases":[]}')
            assert daemon.put("/leases/acquire", json={"underlay_ip": "10.0.0.5"}).status_code == 200
        assert controller.end() == 0
    finally:
        controller.close()


def test_a_missing_file(tmp_path: Path) -> None:
    controller = ControllerProcess(tmp_path, "unused")
    controller.launch("-config", str(tmp_path / "none"))
    assert controller.process is not None
    assert controller.process.wait(60) == 1
    text = f"cfnetworking.silk-controller error: read config: open {tmp_path}/none: no such file or directory"
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d " + re.escape(text) + "\n", controller.log)
