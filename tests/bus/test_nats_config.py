"""`silkbus nats-config`: what it writes, what it keeps, and what it says of a wrong command line."""

import re
import subprocess
from pathlib import Path

import pytest

from bus.nats_config import main
from tests.nats_server import program


def run(out: Path, *arguments: str) -> int:
    return main(["--out", str(out), *arguments])


def content(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_another_cell_changes_nobody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers = ["--servers", "n1=127.0.0.1:4222:6222,n2=nats.example:4222:6222"]
    assert run(tmp_path, "--cells", "a,b", "--readers", "r", *servers) == 0
    before = content(tmp_path)
    assert run(tmp_path, "--cells", "a,b", "--readers", "r", *servers) == 0
    assert content(tmp_path) == before
    assert "0 files written" in capsys.readouterr().out
    assert run(tmp_path, "--cells", "a,b,c", "--readers", "r", *servers) == 0
    after = content(tmp_path)
    new = {"clients/cell/c/ca.crt", "clients/cell/c/client.crt", "clients/cell/c/client.key"}
    assert after.keys() - before.keys() == new
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"servers/n1/accounts.conf", "servers/n2/accounts.conf"}


def test_a_server_that_moves_gets_another_certificate_for_its_key(tmp_path: Path) -> None:
    run(tmp_path, "--cells", "a", "--servers", "n=127.0.0.1")
    before = content(tmp_path)
    run(tmp_path, "--cells", "a", "--servers", "n=127.0.0.2")
    after = content(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"servers/n/server.crt"}


def test_keys_are_private_and_stay_where_they_belong(tmp_path: Path) -> None:
    run(tmp_path, "--cells", "a", "--servers", "n1=127.0.0.1,n2=127.0.0.2")
    keys = list(tmp_path.rglob("*.key"))
    assert len(keys) == 2 + 4 + 4
    assert {oct(key.stat().st_mode & 0o777) for key in keys} == {"0o600"}
    assert {key.parent.name for key in tmp_path.rglob("*ca.key")} == {"authority"}
    assert oct((tmp_path / "authority").stat().st_mode & 0o777) == "0o700"
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("servers", ["n=127.0.0.1", "n1=127.0.0.1,n2=127.0.0.2:4223:6223,n3=nats.example"])
def test_nats_server_takes_it_and_every_permission_says_why(tmp_path: Path, servers: str) -> None:
    run(tmp_path, "--cells", "a,B_2", "--readers", "r", "--servers", servers)
    for file in tmp_path.rglob("nats-server.conf"):
        checked = subprocess.run([program(), "-t", "-c", str(file)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        accounts = (file.parent / "accounts.conf").read_text()
        for granted in re.findall(r"(?:publish|subscribe): \[\n(.*?)\n +\]", accounts, re.DOTALL):
            assert granted.lstrip().startswith("#")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells", "a b"], "'a b' is not a cell name"),
        (["--cells", "a", "--servers", "n"], "server 'n': must be NAME=HOST"),
        (["--cells", "a", "--servers", "n=h:x"], "server 'n=h:x': must be NAME=HOST"),
        (["--cells", "a", "--servers", "n=h,n=i"], "each with a name of its own"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "out", "--cells", "a") == 1
    assert "file/out" in capsys.readouterr().err
