"""A machine that BOSH deployed: a mount namespace with /var/vcap, and a network namespace for a cell.

Jobs are rendered and started as BOSH does it: pre-start, what monit starts, post-start. What bpm starts runs without
capabilities, as there; what it would also hide (other processes, folders) is not hidden here.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.bosh.release import Instance, render, spec

PATIENCE = 120.0
PROGRAMS = Path(sys.executable).parent
BPM = re.compile(r"/var/vcap/jobs/bpm/bin/bpm (start|stop) (\S+)")
NO_CAPABILITIES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"]


def eventually(what: str, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.1)


class Machine:
    def __init__(self, enter: Sequence[str], root: Path, instance: Instance) -> None:
        self._enter = enter
        self.vcap = root / "var" / "vcap"
        """The machine's /var/vcap, as this process reaches it."""
        self.instance = instance
        self.bpm: dict[str, subprocess.Popen[bytes]] = {}
        self.jobs: list[str] = []

    def run(self, *command: str, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run([*self._enter, *command], input=stdin, capture_output=True, timeout=PATIENCE)
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done!r}\n{self.logs()}"
        return done

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._enter, *command])

    def install(self) -> None:
        """The packages, as their packaging scripts leave them."""
        package = self.vcap / "packages" / "silkbus" / "bin"
        package.mkdir(parents=True)
        for program in PROGRAMS.glob("silkbus*"):
            (package / program.name).symlink_to(program)
        where = ["/var/vcap/packages/silkbus/bin", "--run-dir", "/var/vcap/sys/run/silkbus"]
        self.run(f"{where[0]}/silkbus", "install-garden", *where)
        nats = self.vcap / "packages" / "nats-server" / "bin"
        nats.mkdir(parents=True)
        (nats / "nats-server").symlink_to(PROGRAMS / "nats-server")

    def deploy(self, job: str, properties: dict[str, Any], links: dict[str, Any]) -> None:
        """Render a job into its folder, with a folder for what it logs."""
        for name, text in render(job, properties, links, self.instance).items():
            file = self.vcap / "jobs" / job / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o750 if name.startswith("bin/") else 0o640)
        for folder in (f"sys/log/{job}", f"sys/run/{job}", f"store/{job}"):
            (self.vcap / folder).mkdir(parents=True, exist_ok=True)
        self.jobs.append(job)

    def script(self, job: str, name: str) -> str:
        """What a script of a job prints; nothing if it has none."""
        if f"bin/{name}" not in spec(job)["templates"].values():
            return ""
        return self.run(f"/var/vcap/jobs/{job}/bin/{name}").stdout.decode()

    def start(self, *jobs: str) -> None:
        """As BOSH: all pre-starts, all processes, all post-starts."""
        for job in jobs:
            self.script(job, "pre-start")
        for job in jobs:
            self.monit(job, "start")
        for job in jobs:
            self.script(job, "post-start")

    def monit(self, job: str, verb: str) -> None:
        found = re.search(rf'{verb} program "([^"]+)"', (self.vcap / "jobs" / job / "monit").read_text())
        if found is None:
            return
        command = found[1]
        if bpm := BPM.fullmatch(command):
            assert bpm[2] == job
            self._bpm(job, verb)
        else:
            self.run(*command.split())

    def _bpm(self, job: str, verb: str) -> None:
        if verb == "stop":
            process = self.bpm.pop(job)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) in (0, 1), self.logs()  # nats-server ends with 1
            return
        (process,) = yaml.safe_load((self.vcap / "jobs" / job / "config" / "bpm.yml").read_text())["processes"]
        with (self.vcap / "sys" / "log" / job / f"{job}.stderr.log").open("ab") as log:
            command = [*self._enter, *NO_CAPABILITIES, process["executable"], *process["args"]]
            self.bpm[job] = subprocess.Popen(command, stdout=log, stderr=log)

    def process(self, job: str) -> int:
        """The process of a job that is not bpm's."""
        return int((self.vcap / "sys" / "run" / "silkbus" / f"{job}.pid").read_text())

    def get(self, service: str, path: str) -> tuple[int, Any]:
        """What a service of the cell answers on its socket: status, and the body."""
        socket = f"/var/vcap/sys/run/silkbus/{service}/{service}.sock"
        done = self.run(
            "curl", "-s", "-w", "\n%{http_code}", "--unix-socket", socket, f"http://{service}{path}", check=False
        )
        *body, status = done.stdout.decode().splitlines() or ["0"]
        try:
            return int(status), json.loads("\n".join(body))
        except ValueError:
            return int(status), "\n".join(body)

    def logs(self) -> str:
        files = sorted((self.vcap / "sys" / "log").glob("*/*.log"))
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def stop(self) -> None:
        for pidfile in (self.vcap / "sys" / "run" / "silkbus").glob("*.pid"):
            with_pid = int(pidfile.read_text())
            if Path(f"/proc/{with_pid}").exists():
                os.kill(with_pid, signal.SIGKILL)
        for process in self.bpm.values():
            process.kill()
            process.wait()


SETUP = """
mount -t tmpfs tmpfs /var && mount -t tmpfs tmpfs /run && ln -s /run /var/run && mkdir -p /var/vcap /var/tmp
"""
UNDERLAY = """
ip link set lo up && ip link add eth0 type veth peer name switch && ip address add {address}/24 dev eth0
ip link set eth0 up && ip link set switch up
"""


@contextmanager
def machine(instance: Instance, *, network: bool) -> Iterator[Machine]:
    """A machine; with `network` in a network namespace of its own, with the instance's address."""
    kinds = ["--mount", *(["--net"] if network else [])]
    own = {kind: Path(f"/proc/self/ns/{kind}").readlink() for kind in ("mnt", *(["net"] if network else []))}
    with subprocess.Popen(["unshare", *kinds, "--propagation", "private", "sleep", "infinity"]) as process:
        place = Path(f"/proc/{process.pid}")
        try:
            for kind, ours in own.items():
                eventually(
                    "the namespace exists", lambda kind=kind, ours=ours: (place / "ns" / kind).readlink() != ours
                )
            enter = ["nsenter", f"--target={process.pid}", *kinds, "--"]
            made = Machine(enter, place / "root", instance)
            made.run("sh", "-ec", SETUP + (UNDERLAY.format(address=instance.address) if network else ""))
            try:
                made.install()
                yield made
            finally:
                made.stop()
        finally:
            process.kill()
