"""The archive for support: what is in it, and that no secret is."""

import json
import os
import re
import subprocess
import sys
import tarfile
import timeit
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.diags import write
from cli.errors import Failed
from cli.main import main
from cli.redaction import REMOVED, Redactor
from tests.cli.conftest import PROGRAM
from tests.policy.server import ADMIN_TOKEN, POLICIES, PolicyServer, body, policy

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"
SECRETS = (
    "hunter2hunter2",
    "s3cr3tvalue",
    "f00bar-baz",
    JWT,
    "MIIEow",
    "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY",
)


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: bearer hunter2hunter2",
        '{"message": "calling", "authorization": "Basic hunter2hunter2"}',
        'headers={"Authorization": "Bearer f00bar-baz"}',
        '"{\\"password\\": \\"s3cr3tvalue\\"}"',
        "postgresql://user:s3cr3tvalue@db.internal:5432/policies",
        "nats://hunter2hunter2@bus:4222",
        "SILKBUS_DB_PASSWORD=s3cr3tvalue",
        "uaa_client_secret: s3cr3tvalue",
        "--token hunter2hunter2",
        f"token is {JWT}.",
        f"key:\n{PEM}\nmore",
        PEM.partition("-----END")[0],
        "seed SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY",
        "refresh_token=f00bar-baz&grant_type=refresh_token",
        "'apiKey': 's3cr3tvalue'",
        "Cookie: session=hunter2hunter2",
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str) -> None:
    clean = Redactor().text(text)
    assert REMOVED in clean
    assert not any(secret in clean for secret in SECRETS), clean


def test_what_is_no_secret_stays() -> None:
    for text in (
        '{"time": "2026-11-23", "message": "in sync", "table": "policies", "revision": 7}',
        "-A sb-forward -m comment --comment sb:0123456789ab -j ACCEPT",
        "10.255.1.2 dev s-010255001002 lladdr ee:ee:0a:ff:01:02 PERMANENT",
        "nats://127.0.0.1:4222",
        "silkbus_policies 12",
    ):
        assert Redactor().text(text) == text


@pytest.mark.parametrize(
    "piece", ["a", "a.b-", "a+", "token", "bearer ", "-----BEGIN ", '="\\\\', "eyJ", "http://", "x:", "{"]
)
def test_long_lines_take_no_longer_than_they_are_long(piece: str) -> None:
    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        return min(timeit.repeat(lambda: Redactor().text(text), number=1, repeat=3))

    # Four times as long: sixteen times as slow if it were quadratic.
    assert seconds(80_000) < 10 * seconds(20_000) + 3


def test_keys_that_mean_a_secret_lose_their_values_whatever_they_are() -> None:
    value = {"a": [{"uaa_client_secret": {"x": ["y"]}, "nats_key": "/etc/key.pem", "token_file": None}], "tokens": [1]}
    assert Redactor().value(value) == {
        "a": [{"uaa_client_secret": REMOVED, "nats_key": "/etc/key.pem", "token_file": None}],
        "tokens": REMOVED,
    }


@settings(deadline=None)
@given(secret=st.text(st.characters(codec="utf-8"), min_size=4, max_size=30), before=st.text(), after=st.text())
def test_a_known_secret_is_nowhere(
    tmp_path_factory: pytest.TempPathFactory, secret: str, before: str, after: str
) -> None:
    if not secret.strip() or secret.strip() in REMOVED or len(secret.strip()) < 4:
        return
    target = tmp_path_factory.getbasetemp() / "diags.tar.gz"
    files = {
        "plain.txt": before + secret + after,
        "log.txt": json.dumps({"message": before + secret, secret: after}) + "\n",
        "value.json": json.dumps([{before: {after: secret}}], ensure_ascii=False),
    }
    try:
        write(target, files, Redactor([secret]))
    except Failed:
        return  # rather no archive at all
    for text in members(target).values():
        assert secret.strip() not in text
        assert json.dumps(secret.strip())[1:-1] not in text


def members(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as opened:
        found = {}
        for member in opened:
            file = opened.extractfile(member)
            assert file is not None
            found[member.name.removeprefix("silkbus-diags/")] = file.read().decode()
        return found


def test_what_the_api_knows_and_no_token(
    environment: dict[str, str],
    standing_server: PolicyServer,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with standing_server.client() as client:
        client.post(POLICIES, json=body(policy("guid-front", "guid-back"))).raise_for_status()
    for name in list(os.environ):
        if name.startswith(("SILKBUS_", "CF_", "XDG_")):
            monkeypatch.delenv(name)
    for name, value in {**environment, "HOME": str(home), "SILKBUS_DATABASE_PASSWORD": "s3cr3tvalue"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # a developer's machine
    config = tmp_path / "enforcer.json"
    config.write_text(
        json.dumps({"cell": "cell-1", "database": "mysql://silk:hunter2hunter2@db/x", "db_password": "q"})
    )
    log = tmp_path / "server.log"
    log.write_text(
        f'{{"message": "asked with {ADMIN_TOKEN}", "token": "f00bar-baz"}}\nplain {ADMIN_TOKEN} s3cr3tvalue\n{PEM}\n'
    )
    archive = tmp_path / "out.tar.gz"
    assert main(["diags", str(archive), "--log", str(log), "--config", str(config), "--log", str(tmp_path / "no")]) == 0
    assert "Not in it: logs/1-no: " in capsys.readouterr().out
    assert archive.stat().st_mode & 0o777 == 0o600
    found = members(archive)
    assert json.loads(found["api/history.json"])["history"][0]["added"][0]["source"]["id"] == "guid-front"
    assert found["api/metrics.txt"].startswith("200\n")
    assert json.loads(found["settings/enforcer.json"])["cell"] == "cell-1"
    assert not [name for name in found if name.startswith("cell/")]
    assert "logs/1-no: " in found["missing.txt"]
    whole = "\n".join(found.values())
    for secret in (ADMIN_TOKEN, json.dumps(ADMIN_TOKEN)[1:-1], *SECRETS):
        assert secret not in whole


@pytest.mark.kernel
def test_what_a_cell_has(tmp_path: Path) -> None:
    namespace = f"diags-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True, timeout=30)
    try:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SILKBUS_", "CF_"))}
        done = subprocess.run(
            ["ip", "netns", "exec", namespace, PROGRAM, "diags", str(tmp_path / "out.tar.gz"), "--no-api"],
            env={**kept, "HOME": str(tmp_path), "XTABLES_LOCKFILE": str(tmp_path / "lock"), "SILKBUS_TOKEN": JWT},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        subprocess.run(["ip", "netns", "delete", namespace], check=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    found = members(tmp_path / "out.tar.gz")
    assert json.loads(found["cell/doctor.json"])["findings"]
    assert re.search(r"^\d+: lo: ", found["cell/links.txt"], re.MULTILINE)
    assert f"python {sys.version}" in found["about.txt"]
    assert JWT not in "".join(found.values())
