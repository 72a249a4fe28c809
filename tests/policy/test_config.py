"""The policy server run with the configuration file of the original (contract/policy.md 1.12, 1.13)."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.policy import legacy_config
from services.policy.legacy_config import CannotUse
from tests.databases import Server
from tests.nats_server import free_port
from tests.policy.server import NOWHERE, POLICIES, body, policy
from tests.policy.stubs import LOGIN, CloudControllerStub, Uaa, certificate

FATAL = r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d "


def rendered(**changes: Any) -> dict[str, Any]:
    """A file as BOSH renders it, with these keys changed (`database__host` is in the database), or absent: None."""
    content: dict[str, Any] = {
        "listen_host": "127.0.0.1",
        "listen_port": 4002,
        "enable_tls": False,
        "server_cert_file": "/var/vcap/jobs/policy-server/config/certs/server.crt",
        "server_key_file": "/var/vcap/jobs/policy-server/config/certs/server.key",
        "log_prefix": "cfnetworking",
        "debug_server_host": "127.0.0.1",
        "debug_server_port": 31821,
        "uaa_client": LOGIN[0],
        "uaa_client_secret": LOGIN[1],
        "uaa_url": "https://uaa.service.cf.internal",
        "uaa_port": 8443,
        "uaa_ca": "",
        "cc_url": "https://api.example.com",
        "cc_ca_cert": "",
        "cc_app_request_chunk_size": 0,
        "skip_ssl_validation": False,
        "database": {
            "type": "postgres",
            "user": "network_policy",
            "password": "p@ss:/w",
            "host": "sql.service.cf.internal",
            "port": 5432,
            "timeout": 120,
            "database_name": "network_policy",
            "require_ssl": False,
            "ca_cert": "",
            "skip_hostname_validation": False,
        },
        "database_migration_timeout": 600,
        "max_idle_connections": 10,
        "max_open_connections": 200,
        "connections_max_lifetime_seconds": 3600,
        "tag_length": 2,
        "metron_address": "127.0.0.1:3457",
        "log_level": "info",
        "cleanup_interval": 3600,
        "request_timeout": 5,
        "max_policies": 150,
        "enable_space_developer_self_service": False,
        "allowed_cors_domains": [],
        "something_new": {"that": ["nobody knows"]},
    }
    for name, value in changes.items():
        place, _, key = name.rpartition("__")
        target = content[place] if place else content
        target[key] = value
        if value is None:
            del target[key]
    return content


def read(folder: Path, content: object) -> legacy_config.LegacyConfig:
    path = folder / "policy-server.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return legacy_config.read(path)


def test_keys_become_settings(tmp_path: Path) -> None:
    assert read(tmp_path, rendered()).environment == {
        "SILKBUS_LISTEN": "127.0.0.1:4002",
        "SILKBUS_DEBUG_LISTEN": "127.0.0.1:31821",
        "SILKBUS_LOG_LEVEL": "info",
        "SILKBUS_TAG_LENGTH": "2",
        "SILKBUS_MAX_POLICIES": "150",
        "SILKBUS_CLEANUP_INTERVAL": "3600",
        "SILKBUS_ALLOWED_CORS_DOMAINS": "",
        "SILKBUS_DATABASE": "postgresql://network_policy:p%40ss%3A%2Fw@sql.service.cf.internal:5432/network_policy",
        "SILKBUS_DATABASE_CONNECT_TIMEOUT": "120",
        "SILKBUS_DATABASE_CONNECTIONS": "200",
        "SILKBUS_DATABASE_CONNECTION_LIFETIME": "3600",
        "SILKBUS_AUTH": "uaa-check",
        "SILKBUS_UAA_PORT": "8443",
        "SILKBUS_UAA_URL": "https://uaa.service.cf.internal",
        "SILKBUS_UAA_CLIENT": LOGIN[0],
        "SILKBUS_UAA_CLIENT_SECRET": LOGIN[1],
        "SILKBUS_CC_URL": "https://api.example.com",
        "SILKBUS_SKIP_SSL_VALIDATION": "false",
        "SILKBUS_ENABLE_SPACE_DEVELOPER_SELF_SERVICE": "false",
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"listen_host": "::"}, {"LISTEN": "[::]:4002"}),
        ({"log_level": "warn"}, {"LOG_LEVEL": "warning"}),
        ({"log_level": None}, {"LOG_LEVEL": "info"}),
        ({"allowed_cors_domains": ["https://a", "*"]}, {"ALLOWED_CORS_DOMAINS": "https://a,*"}),
        ({"enable_tls": True}, {"ENABLE_TLS": "true"}),
        ({"enable_space_developer_self_service": True}, {"ENABLE_SPACE_DEVELOPER_SELF_SERVICE": "true"}),
        ({"database__type": "mysql"}, {"DATABASE": "mysql://network_policy:p%40ss%3A%2Fw@sql.service.cf.internal"}),
        ({"database__host": "fd00::1"}, {"DATABASE": "postgresql://network_policy:p%40ss%3A%2Fw@[fd00::1]:5432"}),
        ({"database__password": None}, {"DATABASE": "postgresql://network_policy@sql.service.cf.internal"}),
        ({"database__require_ssl": True, "database__ca_cert": "/ca"}, {"DATABASE_TLS": "verify", "DATABASE_CA": "/ca"}),
        ({"database__require_ssl": True, "database__skip_hostname_validation": True}, {"DATABASE_TLS": "encrypt"}),
        ({"max_open_connections": 1}, {"DATABASE_CONNECTIONS": "2"}),
    ],
)
def test_particular_keys(tmp_path: Path, changes: dict[str, Any], expected: dict[str, str]) -> None:
    environment = read(tmp_path, rendered(**changes)).environment
    assert {name: environment[f"SILKBUS_{name}"][: len(value)] for name, value in expected.items()} == expected


def test_keys_in_any_case(tmp_path: Path) -> None:
    content = {name.upper(): value for name, value in rendered().items()}
    assert read(tmp_path, content).environment == read(tmp_path, rendered()).environment


INVALID = "could not read config file: invalid config: "


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "could not read config file: parsing config: unexpected end of JSON input"),
        ("[1]", "could not read config file: parsing config: the body must be an object, not a list"),
        (
            rendered(listen_port="4002"),
            "could not read config file: parsing config: config.listen_port must be an integer, not a string",
        ),
        (rendered(listen_host=""), INVALID + "ListenHost: zero value"),
        (rendered(listen_port=0, database__host=None), INVALID + "Database.Host: zero value, ListenPort: zero value"),
        (rendered(uaa_url=None, cc_url=None), INVALID + "UAAURL: zero value, CCURL: zero value"),
        (rendered(database__timeout=0), INVALID + "Database.Timeout: less than min"),
        (rendered(cleanup_interval=0, max_policies=-1), INVALID + "CleanupInterval: less than min, MaxPolicies: less"),
        (rendered(max_open_connections=-1), INVALID + "MaxOpenConnections: less than min"),
        (
            rendered(database__type="x"),
            "db connect: failed to create connection string: database type 'x' is not supported",
        ),
        (rendered(log_level="loud"), "unknown log level: loud; use debug, info, warn, error or fatal"),
    ],
)
def test_fatal_errors_are_told_as_the_original_tells_them(tmp_path: Path, content: object, text: str) -> None:
    with pytest.raises(CannotUse) as error:
        read(tmp_path, content)
    assert re.match(FATAL + re.escape(f"cfnetworking.policy-server: {text}"), str(error.value))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.policy.server", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("flag", ["-config-file", "--config-file"])
def test_a_missing_file(tmp_path: Path, flag: str) -> None:
    done = run(flag, str(tmp_path / "none"))
    expected = f"could not read config file: reading config: open {tmp_path}/none: no such file or directory"
    assert re.fullmatch(FATAL + re.escape(f"cfnetworking.policy-server: {expected}\n"), done.stderr)
    assert done.returncode == 1
    assert run("-h").returncode == 0


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    changes = {"database__host": "127.0.0.1", "database__port": free_port(), "database__timeout": 1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(rendered(**changes, log_prefix="net", listen_port=free_port())))
    done = run("-config-file", str(path), SILKBUS_NATS=NOWHERE, SILKBUS_DEBUG_LISTEN="")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(FATAL + re.escape("net.policy-server: db connect: unable to ping: database "), last), done.stderr
    assert "p@ss" not in done.stderr
    assert "p%40ss" not in done.stderr


@dataclass
class Installation:
    url: str
    debug: str
    uaa: Uaa
    controller: CloudControllerStub
    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture
def installation(tmp_path: Path, postgresql: Server) -> Iterator[Installation]:
    """A server that is told nothing but the original's file, and where NATS is."""
    authority, files = certificate(tmp_path)
    uaa = Uaa(files)
    controller = CloudControllerStub(uaa, files)
    host, _, port = uaa.url.rpartition(":")
    blank = tmp_path / "blank"
    blank.write_text(" \n")
    listen, debug = free_port(), free_port()
    postgresql.sql("CREATE DATABASE legacy")
    content = rendered(
        listen_port=listen,
        debug_server_port=debug,
        uaa_url=host,
        uaa_port=int(port),
        uaa_ca=str(authority),
        cc_url=controller.url,
        cc_ca_cert=str(blank),
        database__host="127.0.0.1",
        database__port=postgresql.port,
        database__user="silkbus",
        database__database_name="legacy",
        tag_length=1,
    )
    path, log = tmp_path / "policy-server.json", tmp_path / "log"
    path.write_text(json.dumps(content))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.policy.server", "-config-file", str(path)],
            env={**os.environ, "SILKBUS_NATS": NOWHERE},
            stderr=output,
        )
    try:
        uaa.start()
        controller.start()
        url = f"http://127.0.0.1:{listen}"
        deadline = time.monotonic() + 60
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Installation(url, f"http://127.0.0.1:{debug}", uaa, controller, process, log)
    finally:
        process.kill()
        process.wait()
        uaa.stop()
        controller.stop()
        postgresql.sql("DROP DATABASE legacy WITH (FORCE)")


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_what_bosh_renders_is_enough(installation: Installation) -> None:
    here = installation
    here.controller.apps = {"a": "space", "b": "space", "c": "other"}
    here.controller.developers = {"dev-guid": {"space"}}
    admin, developer = here.uaa.token("network.admin"), here.uaa.token("network.write")
    with httpx.Client(base_url=here.url, trust_env=False, timeout=60) as client:
        for token, item, status in (
            (developer, policy("a", "b"), 200),
            (developer, policy("a", "c"), 403),
            (admin, policy("a", "c"), 200),
        ):
            headers = {"Authorization": f"bearer {token}"}
            assert client.post(POLICIES, json=body(item), headers=headers).status_code == status
        headers = {"Authorization": f"bearer {admin}"}
        assert client.get(POLICIES, headers=headers).json()["total_policies"] == 2
        tags = client.get("/networking/v1/external/tags", headers=headers).json()["tags"]
        assert [len(tag["tag"]) for tag in tags] == [2, 2, 2]

    def debug_lines() -> int:
        count = here.log.read_text().count('"level": "debug"')
        assert answers(f"{here.url}/health")
        return here.log.read_text().count('"level": "debug"') - count

    assert debug_lines() == 0
    for word in ("DEBUG", "d", "0", "debug\n"):
        assert set_level(here, "info") == set_level(here, word) == (200, b"")
        assert debug_lines() >= 2
    assert set_level(here, "louder") == (200, b"")
    assert debug_lines() >= 2
    assert set_level(here, "FATAL") == (200, b"")
    assert debug_lines() == 0
    assert httpx.get(f"{here.debug}/debug/pprof/", trust_env=False).status_code == 404
    here.process.terminate()
    assert here.process.wait(60) == 0


def set_level(here: Installation, word: str) -> tuple[int, bytes]:
    answer = httpx.put(f"{here.debug}/log-level", content=word, trust_env=False, timeout=30)
    return answer.status_code, answer.content
