"""The systemd units: systemd takes them as they are, and each service runs as its unit says it is run."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.certificates import Authority
from compose.systemd.install import PARTS, main, unit_files
from tests.nats_server import free_port

PROGRAMS = Path(sys.executable).parent
SERVICES = [name for names in PARTS.values() for name in names if not name.endswith(".target")]
PATIENCE = 90.0


def unit(name: str) -> dict[str, list[str]]:
    """The directives of a service's unit, by name; one may be given several times."""
    found: dict[str, list[str]] = {}
    for part in PARTS:
        text = unit_files(part, PROGRAMS).get(f"etc/systemd/system/{name}.service", "")
        for line in text.splitlines():
            key, equals, value = line.partition("=")
            if equals and not key.startswith("#"):
                found.setdefault(key, []).append(value)
    return found


@pytest.mark.packaging
@pytest.mark.parametrize("part", PARTS)
def test_systemd_takes_the_units(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It warns of directives that it does not know, of programs that are not there, and of units that are missing."""
    assert main([part, "--root", str(tmp_path)]) == 0
    assert "systemctl enable --now" in capsys.readouterr().out
    units = sorted((tmp_path / "etc/systemd/system").iterdir())
    assert {each.stem for each in units} == {name.removesuffix(".target") for name in PARTS[part]}
    command = ["systemd-analyze", "verify", "--man=no", *map(str, units)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "silkbus" in line]
    assert (done.returncode, said) == (0, [])


def test_where_nothing_may_be_written_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "etc").write_text("a file")
    assert main(["cell", "--root", str(tmp_path)]) == 1
    assert f"{tmp_path}/etc" in capsys.readouterr().err


@pytest.mark.parametrize("name", SERVICES)
def test_a_hung_or_ended_service_is_started_again_for_ever(name: str) -> None:
    directives = unit(name)
    assert directives["Type"] == ["notify"]
    assert directives["WatchdogSec"] == ["30s"]
    assert directives["Restart"] == ["always"]
    assert directives["StartLimitIntervalSec"] == ["0"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="sbu-") as folder:
        yield Path(folder)


def settings_for(name: str, folder: Path) -> dict[str, str]:
    common = {
        "NATS": "nats://127.0.0.1:1",
        "DATABASE": f"sqlite:///{folder}/{name}.db",
        "RUN_DIR": str(folder / "run"),
        "STATE_DIR": str(folder / "state"),
    }
    if name in PARTS["cell"]:
        return {**common, "CELL": "cell-1", "UNDERLAY": "127.0.0.1"}
    if name == "silkbus-policy-server":
        (folder / "tokens").write_text('{"tokens": []}')
        return {**common, "LISTEN": f"127.0.0.1:{free_port()}", "TOKENS": str(folder / "tokens")}
    if name == "silkbus-policy-server-internal":
        authority = Authority(folder, "authority")
        authority.ensure()
        authority.issue(folder / "server.crt", folder / "server.key", names=["IP:127.0.0.1"], usage="serverAuth")
        return {
            **common,
            "CA_CERT_FILE": str(authority.certificate),
            "SERVER_CERT_FILE": str(folder / "server.crt"),
            "SERVER_KEY_FILE": str(folder / "server.key"),
            "LISTEN_HOST": "127.0.0.1",
            "INTERNAL_LISTEN_PORT": str(free_port()),
            "HEALTH_CHECK_PORT": str(free_port()),
        }
    return common


@pytest.mark.kernel
@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_as_its_unit_says(name: str, folder: Path) -> None:
    """With the unit's capabilities only, in a network namespace of its own, and without a bus: it is ready, gives signs
    of life, says when it stops, and ends with 0."""
    directives = unit(name)
    granted = "".join(
        f",+{each.removeprefix('CAP_').lower()}" for each in directives["CapabilityBoundingSet"][0].split()
    )
    confined = ["setpriv", "--no-new-privs", "--bounding-set", f"-all{granted}", "--inh-caps", "-all"]
    (program,) = directives["ExecStart"]
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(folder / "notify"))
    notified.settimeout(1)
    settings = {f"SILKBUS_{key}": value for key, value in settings_for(name, folder).items()}
    environment = {
        "PATH": os.environ["PATH"],
        **settings,
        "NOTIFY_SOCKET": str(folder / "notify"),
        "WATCHDOG_USEC": "900000",
        "XTABLES_LOCKFILE": str(folder / "xtables.lock"),
    }
    log = folder / "log"
    with log.open("wb") as file:
        # `exec` all the way: the process that is signalled is the service.
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *confined, program]
        process = subprocess.Popen(command, env=environment, stderr=file, stdout=file, cwd=folder)
    try:
        heard: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        while heard != {"READY=1", "WATCHDOG=1"}:
            assert process.poll() is None, log.read_text()
            try:
                heard.add(notified.recv(4096).decode())
            except TimeoutError:
                assert time.monotonic() < deadline, f"only {heard} was said:\n{log.read_text()}"
        process.send_signal(signal.SIGTERM)
        notified.settimeout(PATIENCE)
        while notified.recv(4096) != b"STOPPING=1":
            pass
        assert process.wait(PATIENCE) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        notified.close()
