"""compose/docker for real: built, brought up, a policy, who reaches whom, each service killed, taken down.

Docker's daemon runs in namespaces of the test's own, which have no way out: images are built from Debian's packages and
from wheels that are got before.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.dockerd import CACHE, Dockerd, Unavailable
from tests.test_wheel import PACKAGES, ROOT, listed_by_git

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(1500)]

PATIENCE = 300.0
CENTRE = ("nats", "postgres", "policy-server-1", "policy-server-2", "policy-server", "silk-controller")
CELLS = ("cell-1", "cell-2", "cell-3")
PLACED = {"cell-1": ("frontend", "backend", "db"), "cell-2": ("frontend", "cache"), "cell-3": ("backend", "cache")}
INSTANCES = {f"{app}-{cell}" for cell, apps in PLACED.items() for app in apps}
POLICIES = [("frontend", "backend", 8080), ("backend", "db", 9090)]
CELL_CAPABILITIES = {
    *("NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE", "DAC_OVERRIDE", "CHOWN", "FOWNER"),
    *("SETPCAP", "SETUID", "SETGID"),
}


class Installation:
    """The project's tree copied to a folder, with `docker-compose` run in it as an operator would."""

    def __init__(self, daemon: Dockerd, source: Path) -> None:
        self.daemon = daemon
        self.folder = source / "compose/docker"

    def compose(self, *arguments: str, check: bool = True, timeout: float = 300) -> str:
        program = [str(self.folder / "docker-compose")]
        done = self.daemon.run([*program, *arguments], check=check, timeout=timeout)
        return done.stdout

    def cli(self, *arguments: str) -> str:
        return self.compose("run", "--rm", "-T", "silkbus", *arguments)

    def inspect(self, service: str) -> dict[str, Any]:
        identity = self.compose("ps", "-q", service).split()
        assert identity, f"{service} has no container"
        described: list[dict[str, Any]] = json.loads(self.daemon.docker("inspect", identity[0]).stdout)
        return described[0]

    def healthy(self, services: tuple[str, ...] = CENTRE + CELLS) -> None:
        for service in services:
            until(lambda service=service: self.inspect(service)["State"]["Health"]["Status"] == "healthy", service)

    def matrix(self) -> dict[str, dict[str, list[int]]]:
        """Who reaches whom on which ports; nothing while no app is attached."""
        command = [sys.executable, str(self.folder / "matrix"), "--json"]
        done = self.daemon.run(command, check=False, COMPOSE=str(self.folder / "docker-compose"))
        seen: dict[str, dict[str, list[int]]] = json.loads(done.stdout or "{}")
        return seen

    def settled(self, policies: list[tuple[str, str, int]]) -> float:
        """Wait until exactly these reach each other; the seconds it took."""
        expected = {
            source: {
                destination: ports
                for destination in sorted(INSTANCES - {source})
                if (ports := [port for a, b, port in policies if (a, b) == (app(source), app(destination))])
            }
            for source in INSTANCES
        }
        seen: dict[str, dict[str, list[int]]] = {}

        def as_expected() -> bool:
            seen.clear()
            seen.update(self.matrix())
            return seen == expected

        begun = time.monotonic()
        try:
            until(as_expected, "the matrix")
        except AssertionError:
            pytest.fail(f"reached: {seen}\nexpected: {expected}\n{self.compose('logs', '--tail=15')}")
        return time.monotonic() - begun


def app(instance: str) -> str:
    return instance.rpartition("-cell-")[0]


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"{what} is not as it should be after {PATIENCE:g} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    # Not pytest's folder: a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="sbdocker-", dir="/var/tmp"))
    try:
        daemon = Dockerd(folder)
        daemon.start()
    except Unavailable as error:
        shutil.rmtree(folder)
        pytest.skip(str(error))
    try:
        made = Installation(daemon, source(folder / "source"))
        write_wrapper(made)
        base = CACHE / f"base-{time.strftime('%Y-%W')}.tar"
        for old in set(CACHE.glob("base-*.tar*")) - {base}:
            old.unlink()
        daemon.run([str(made.folder / "make-base")], timeout=400, BASE_TAR=str(base))
        made.compose("build", timeout=400)
        yield made
    finally:
        daemon.stop()
        shutil.rmtree(folder, ignore_errors=True)


def source(folder: Path) -> Path:
    """What git has of the project, and the wheels of what it needs."""
    for name in [*listed_by_git(*PACKAGES), "pyproject.toml", "README.md", ".dockerignore"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    wheels = folder / "compose/docker/wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(wheels), "setuptools>=77"]
    subprocess.run([*command, *requirements()], check=True, timeout=300)
    return folder


def requirements() -> list[str]:
    """What the image's Python needs: of the project, and of its extras that the Dockerfile names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["postgresql"], *extras["embedded"]]


def write_wrapper(made: Installation) -> None:
    """`docker-compose` by its package's own Python, as in /usr/bin."""
    wrapper = made.folder / "docker-compose"
    program = f'/usr/bin/python3 {made.daemon.root}/usr/bin/docker-compose "$@"'
    wrapper.write_text(f'#!/bin/sh\ncd "{made.folder}"\nBASE=silkbus/base exec {program}\n')
    wrapper.chmod(0o755)


def test_up_and_a_policy(installation: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    installation.compose("up", "-d")
    started = time.monotonic() - begun
    installation.settled([])
    attached = time.monotonic() - begun
    for from_app, to_app, port in POLICIES:
        installation.cli("add-network-policy", from_app, to_app, "--protocol", "tcp", "--port", str(port))
    installation.settled(POLICIES)
    with capsys.disabled():
        print(
            f"\ndocker-compose up {started:.1f} s, all apps attached and kept apart {attached:.1f} s, "
            f"policies at work {time.monotonic() - begun:.1f} s"
        )
    installation.healthy()


def test_least_privilege(installation: Installation) -> None:
    for service in CENTRE + CELLS:
        described = installation.inspect(service)
        host, config = described["HostConfig"], described["Config"]
        assert not host["Privileged"], service
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert set(host["CapAdd"] or ()) == (CELL_CAPABILITIES if service in CELLS else set()), service
        assert (config["User"] == "10001") == (service not in CELLS), service
    # In a cell an app has no capabilities and no root, and a service no more than it needs (capabilities(7)).
    for process, bounding in (("container_process", 0), ("silkbus-enforcer", 0x283002)):
        script = f"cat /proc/$(pgrep -o -f {process})/status"
        status = dict(
            line.split(":", 1) for line in installation.compose("exec", "-T", "cell-1", "sh", "-c", script).splitlines()
        )
        assert int(status["CapBnd"], 16) == bounding, process
        assert int(status["CapEff"], 16) == bounding, process
        assert status["NoNewPrivs"].strip() == "1", process


def test_secrets_are_files_of_their_reader_only(installation: Installation) -> None:
    token = installation.compose("run", "--rm", "-T", "--entrypoint", "cat", "silkbus", "/secrets/token").strip()
    assert len(token) == 48
    everything = installation.compose("config") + "".join(
        json.dumps(installation.inspect(service)) for service in CENTRE + CELLS
    )
    assert token not in everything
    assert "postgresql://" not in everything
    files = installation.compose("exec", "-T", "cell-1", "find", "/secrets", "-type", "f").split()
    assert set(files) == {"/secrets/ca.crt", "/secrets/client.crt", "/secrets/client.key"}


def test_the_bus_lets_in_only_who_has_a_certificate(installation: Installation) -> None:
    for program, expected in (
        ("nats.connect('nats://nats:4222', allow_reconnect=False, connect_timeout=5)", "refused"),
        ("bus()", "allowed"),
    ):
        script = f"""
import asyncio, nats, ssl
def bus():
    tls = ssl.create_default_context(cafile="/secrets/ca.crt")
    tls.load_cert_chain("/secrets/client.crt", "/secrets/client.key")
    return nats.connect("nats://nats:4222", tls=tls, allow_reconnect=False, connect_timeout=5)
async def main():
    try:
        await {program}
    except Exception:
        print("refused")
    else:
        print("allowed")
asyncio.run(main())
"""
        seen = installation.compose("exec", "-T", "cell-1", "python", "-W", "ignore", "-c", script)
        assert seen.split()[-1] == expected
    # And the database's network is not the cells'.
    reach = "import socket; socket.create_connection(('postgres', 5432), 3)"
    assert "reached" not in installation.compose(
        "exec", "-T", "cell-1", "python", "-c", f"{reach}; print('reached')", check=False
    )
    central = installation.compose("exec", "-T", "policy-server-1", "python", "-c", f"{reach}; print('reached')")
    assert "reached" in central


def test_every_target_of_prometheus_answers(installation: Installation) -> None:
    installation.compose("--profile", "monitoring", "up", "-d", "--no-deps", "silk-controller-metrics")
    config = yaml.safe_load((installation.folder / "monitoring/prometheus.yml").read_text())
    places = {
        f"http://{target}{job.get('metrics_path', '/metrics')}": job["job_name"]
        for job in config["scrape_configs"]
        for part in job["static_configs"]
        for target in part["targets"]
    }
    script = "import sys, urllib.request as r\nfor u in sys.argv[1:]: print(r.urlopen(u, timeout=10).read().decode())"
    # A policy server is on the gateway's network and on the cells'.
    texts = installation.compose("exec", "-T", "policy-server-2", "python", "-c", script, *places)
    assert len(places) == 13
    dashboard = json.loads((installation.folder / "monitoring/dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))
    shown = set(re.findall(r"\bsilkbus_\w+", queries))
    assert len(shown) > 15
    offered = {line.split("{")[0].split(" ")[0] for line in texts.splitlines() if line.startswith("silkbus_")}
    assert shown - offered <= {"silkbus_enforcer_refused_packets_total"}, "the dashboard asks for what nobody has"


def test_each_service_killed_comes_back(installation: Installation) -> None:
    before = {service: installation.inspect(service) for service in CENTRE + CELLS}
    # One address with failover: a policy server is killed, and the next command is answered.
    installation.daemon.kill(before["policy-server-1"]["State"]["Pid"])
    assert "backend" in installation.cli("network-policies", "--source", "frontend")
    for service in ("nats", "postgres", "silk-controller", "policy-server", "cell-2"):
        installation.daemon.kill(before[service]["State"]["Pid"])
    # One service of a cell: its supervisor starts it again, the container stays.
    installation.compose("exec", "-T", "cell-1", "pkill", "-9", "-o", "-f", "silkbus-enforcer")
    killed = ("policy-server-1", "nats", "postgres", "silk-controller", "policy-server", "cell-2")
    for service in killed:
        until(
            lambda service=service: (
                installation.inspect(service)["State"]["StartedAt"] != before[service]["State"]["StartedAt"]
            ),
            service,
        )
    installation.healthy()
    assert installation.inspect("cell-1")["State"]["StartedAt"] == before["cell-1"]["State"]["StartedAt"]
    installation.settled(POLICIES)
    installation.cli("remove-network-policy", "frontend", "backend", "--protocol", "tcp", "--port", "8080")
    installation.settled(POLICIES[1:])


def test_down_leaves_nothing(installation: Installation) -> None:
    installation.compose("--profile", "monitoring", "down", "--volumes")
    assert installation.daemon.docker("ps", "-aq").stdout == ""
    assert installation.daemon.docker("volume", "ls", "-q").stdout == ""
    assert len(installation.daemon.docker("network", "ls", "-q").stdout.split()) == 3
