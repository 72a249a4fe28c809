"""CNI ADD and DEL as a runtime waits for them, beside Debian's ptp + host-local, portmap and firewall, in one run.

    python -m bench.cni [--iptables nft|legacy] [--calls N] [--present N] [--at-once N]        (as root)

Ours is the installed plugin, as a process, before the real networker, silk worker and enforcer of a cell of a lab. The
others are run one after the other with each other's results, as libcni does it, in another network namespace, with the
same kind of iptables; what a runtime itself costs is in neither. Each container has one forwarded port. They take
turns, so that what else the machine does falls on both alike: first without containers, then with, then many at once.
At the end the resident memory of the cell's three processes.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyroute2 import netns

from compose.lab import lifecycle, namespaces
from compose.lab.containers import plugin_folder
from compose.lab.lab import Lab
from compose.lab.services import CELL

CELL_NAME = "cell-1"
THEIRS = "/usr/lib/cni"
CALL_TIMEOUT = 120.0
FIRST_PORT = 20_000


class Runtime:
    """Attaches containers by a list of plugins, all of whose processes start in one network namespace."""

    def __init__(self, namespace: str, folder: str, plugins: Sequence[Mapping[str, Any]], path: str, lock: str) -> None:
        self._folder = folder
        self._plugins = plugins
        self._environment = {"CNI_IFNAME": "eth0", "CNI_PATH": folder, "PATH": path, "XTABLES_LOCKFILE": lock}
        self._results: dict[str, Mapping[str, Any]] = {}
        # The pool's threads are in the namespace, and so are the processes that they start.
        self.pool = ThreadPoolExecutor(100, initializer=netns.setns, initargs=(namespace,))

    def call(self, command: str, handle: str, number: int) -> float:
        """Milliseconds of one ADD or DEL; it must succeed."""
        return self.pool.submit(self.call_here, command, handle, number).result()

    def call_here(self, command: str, handle: str, number: int) -> float:
        environment = {
            **self._environment,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": handle,
            "CNI_NETNS": f"/run/netns/{handle}",
        }
        mapping = {"hostPort": FIRST_PORT + number, "containerPort": 8080, "protocol": "tcp"}
        result = self._results.pop(handle, None) if command == "DEL" else None
        took = 0.0
        for plugin in self._plugins if command == "ADD" else self._plugins[::-1]:
            config = {"cniVersion": "1.0.0", "name": "bench", **plugin}
            if plugin.get("capabilities"):
                config["runtimeConfig"] = {"portMappings": [mapping]}
            if result is not None:
                config["prevResult"] = result
            text = json.dumps(config)
            began = time.perf_counter()
            done = subprocess.run(  # noqa: S603
                [f"{self._folder}/{plugin['type']}"],
                input=text,
                env=environment,
                capture_output=True,
                text=True,
                timeout=CALL_TIMEOUT,
                check=False,
            )
            took += time.perf_counter() - began
            if done.returncode != 0:
                raise SystemExit(f"{command} of {handle} by {plugin['type']}: {done.stdout} {done.stderr}")
            if command == "ADD":
                result = json.loads(done.stdout)
        if command == "ADD" and result is not None:
            self._results[handle] = result
        return took * 1000


class Bench:
    """Both runtimes, and the containers of each."""

    def __init__(self, lab: Lab, kind: str, folder: Path) -> None:
        self._prefix = lab.layout.namespace("c")
        self._number = itertools.count()
        theirs = lab.layout.namespace("theirs")
        namespaces.create(theirs)
        programs = folder / "bin"
        programs.mkdir()
        for name in ("iptables", "iptables-save", "iptables-restore", "ip6tables"):
            found = shutil.which(name.replace("tables", f"tables-{kind}", 1))
            if found is not None:
                (programs / name).symlink_to(found)
        path = f"{programs}:{os.environ['PATH']}"
        ipam = {
            "type": "host-local",
            "dataDir": str(folder / "ipam"),
            "ranges": [[{"subnet": "10.253.0.0/16"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        chain = [
            {"type": "ptp", "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
            {"type": "firewall", "backend": "iptables"},
        ]
        identity = {"app": "bench-app", "space": "bench"}
        own = [{"type": "silkbus-cni", "capabilities": {"portMappings": True}, **identity}]
        self.runtimes = {
            "silkbus": Runtime(
                lab.layout.namespace(CELL_NAME),
                str(plugin_folder(lab.layout, CELL_NAME)),
                own,
                path,
                str(folder / "unused"),
            ),
            "ptp+portmap+firewall": Runtime(theirs, THEIRS, chain, path, str(folder / "xtables.lock")),
        }

    def namespace(self) -> tuple[str, int]:
        """A new container's network namespace: its name, which is its handle, and its number."""
        number = next(self._number)
        name = f"{self._prefix}{number}"
        namespaces.create(name)
        return name, number

    def measure(self, what: str, calls: int) -> None:
        """ADD and DEL of one container at a time, the runtimes in turns."""
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(calls):
            for name, runtime in self.runtimes.items():
                handle, number = self.namespace()
                for command in ("ADD", "DEL"):
                    times.setdefault((command, name), []).append(runtime.call(command, handle, number))
                namespaces.delete(handle)
        for (command, name), values in sorted(times.items()):
            _print(f"{command}, {what}, {name}", values)
        for command in ("ADD", "DEL"):
            ours, theirs = (statistics.median(times[command, name]) for name in self.runtimes)
            print(f"{command}, {what}: {ours / theirs:.2f} of the others' median")

    def at_once(self, name: str, count: int) -> None:
        """`count` containers attached at once, and then removed at once."""
        runtime = self.runtimes[name]
        made = [self.namespace() for _ in range(count)]
        for command in ("ADD", "DEL"):
            began = time.perf_counter()
            values = list(runtime.pool.map(lambda one, command=command: runtime.call_here(command, *one), made))  # type: ignore[misc]
            print(f"{count} {command} at once, {name}: all within {time.perf_counter() - began:.2f} s")
            _print(f"  each of {count} {command} at once, {name}", values)
        for handle, _ in made:
            namespaces.delete(handle)

    def fill(self, count: int) -> None:
        for _ in range(count):
            for runtime in self.runtimes.values():
                runtime.call("ADD", *self.namespace())


def _print(what: str, milliseconds: Sequence[float]) -> None:
    ordered = sorted(milliseconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    print(f"{what:48} p50 {statistics.median(ordered):7.1f} ms   p99 {p99:7.1f} ms   n {len(ordered)}", flush=True)


def resident(lab: Lab) -> None:
    """Resident memory of the cell's processes (proc_pid_status(5)), and of that what is theirs alone."""
    total = 0
    for part in CELL:
        pid = lab.state.services[f"{CELL_NAME}/{part}"].pid
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        rss, anonymous = (int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
        total += int(status["VmRSS"].split()[0])
        print(f"{part:14} resident {rss:6.1f} MB, of it anonymous {anonymous:6.1f} MB")
    print(f"{'together':14} resident {total / 1024:6.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--iptables", choices=("nft", "legacy"), default="nft", help="[%(default)s]")
    parser.add_argument("--calls", type=int, default=100, help="calls of each kind [%(default)s]")
    parser.add_argument("--present", type=int, default=100, help="containers of the second round [%(default)s]")
    parser.add_argument("--at-once", type=int, default=100, help="containers attached at once [%(default)s]")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sbc-")))
        lab = stack.enter_context(lifecycle.made(f"b{os.getpid()}", 1, iptables=given.iptables))
        bench = Bench(lab, given.iptables, folder)
        bench.measure("none present", given.calls)
        bench.fill(given.present)
        bench.measure(f"{given.present} present", given.calls)
        for name in bench.runtimes:
            bench.at_once(name, given.at_once)
        resident(lab)


if __name__ == "__main__":
    main()
