"""Container runtimes from packages on a cell of the lab, with everything of their own in one folder.

They run in the cell's network namespace and in a mount namespace whose only shared mount is /run/netns: there the
networker sees the namespaces that a runtime makes; all else that a runtime would leave on this machine is hidden by
mounts of its own. Their containers' root is one static program, since no image could be had from anywhere.
"""

import contextlib
import json
import resource
import shutil
import subprocess
import time
from pathlib import Path

from bus.records import Records
from compose.lab import containers, namespaces

PATIENCE = 60.0
PORT = 8080
BUSYBOX = "/bin/busybox"
SERVE = (BUSYBOX, "nc", "-ll", "-p", str(PORT), "-e", BUSYBOX, "echo", "hello")
WAIT = (BUSYBOX, "sleep", "3600")
CGROUPS = Path("/sys/fs/cgroup")

_SCRIPT = """
set -e
mount --make-private /
mkdir -p /var/lib/cni /etc/cni
for hidden in /opt /etc/cni /var/lib/cni; do mount -t tmpfs none "$hidden"; done
mkdir -p /run/containerd && mount -t tmpfs none /run/containerd
mkdir -p /opt/cni/bin /etc/cni/net.d
mount --bind "$1" /opt/cni/bin
mount --bind "$2" /etc/cni/net.d
echo ready
exec sleep infinity
"""


def eventually(what, condition):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.1)
    return found


class Machine:
    """A cell as a container runtime sees it; `run` runs programs there, `start` leaves them running."""

    def __init__(self, lab, cell, folder):
        self.lab, self.cell, self.folder = lab, cell, folder
        self.networks = folder / "net.d"
        self.networks.mkdir()
        self.root = folder / "rootfs"
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            (self.root / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, self.root / "bin" / "busybox")
        self.environment = {}
        self._started = []

    def network(self, **network):
        """Configure the one network that runtimes here know; `network` says who containers are."""
        plugin = {"type": "silkbus-cni", "capabilities": {"portMappings": True}, "space": "lab", **network}
        (self.networks / "10-overlay.conflist").write_text(
            json.dumps({"cniVersion": "1.0.0", "name": "overlay", "plugins": [plugin]})
        )

    def __enter__(self):
        plugins = containers.plugin_folder(self.lab.layout, self.cell)
        command = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", _SCRIPT, "sh"]
        namespace = namespaces.path(self.lab.layout.namespace(self.cell))
        self._holder = subprocess.Popen(
            ["nsenter", f"--net={namespace}", *command, str(plugins), str(self.networks)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        for process in [*self._started[::-1], self._holder]:
            process.kill()
            process.wait(PATIENCE)
        self._holder.stdout.close()

    def _command(self, program):
        return ["nsenter", f"--target={self._holder.pid}", "--mount", "--net", "--", *program]

    def run(self, *program, check=True):
        done = subprocess.run(
            self._command(program), capture_output=True, text=True, timeout=PATIENCE, env=self._variables()
        )
        assert done.returncode == 0 or not check, done
        return done

    def start(self, *program, log):
        with log.open("ab") as output:
            process = subprocess.Popen(self._command(program), stdout=output, stderr=output, env=self._variables())
        self._started.append(process)
        return process

    def _variables(self):
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.folder), **self.environment}

    def records(self):
        """The handles of the containers that the cell knows, beside the lab's own."""
        found = {record.handle for record in self._records()}
        return found - set(self.lab.state.apps)

    def address(self, handle):
        return next((str(record.address) for record in self._records() if record.handle == handle), None)

    def _records(self):
        return Records(self.lab.layout.cell_state(self.cell) / "containers").all()

    def links(self):
        """How many links to containers the cell has."""
        shown = namespaces.run(["ip", "-n", self.lab.layout.namespace(self.cell), "-json", "link", "show"])
        return sum(link["ifname"].startswith("s-") for link in json.loads(shown))


class Podman:
    """Debian's podman with its CNI backend and runc, its storage and state in the machine's folder."""

    def __init__(self, machine):
        self.machine = machine
        folder = machine.folder
        # No more than this machine lets us have: in a sandbox limits may be lower than podman's defaults.
        limits = [
            f"{name}={min(hard, 1024) if hard > 0 else 1024}:{min(hard, 1024) if hard > 0 else 1024}"
            for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
            for hard in [resource.getrlimit(number)[1]]
        ]
        config = {
            "containers": {"default_ulimits": limits, "log_driver": "k8s-file"},
            "network": {
                "network_backend": "cni",
                "cni_plugin_dirs": ["/opt/cni/bin"],
                "network_config_dir": "/etc/cni/net.d",
                "default_network": "overlay",
            },
            "engine": {"cgroup_manager": "cgroupfs", "events_logger": "file", "runtime": "runc"},
        }
        lines = []
        for section, values in config.items():
            lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
        (folder / "containers.conf").write_text("\n".join(lines))
        machine.environment["CONTAINERS_CONF"] = str(folder / "containers.conf")
        self._cgroup = f"podman-{folder.name}"
        self._folders = [
            "--root",
            str(folder / "root"),
            "--runroot",
            str(folder / "run"),
            "--tmpdir",
            str(folder / "tmp"),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self("rm", "--all", "--force", "--time", "0", check=False)
        remove_cgroups(self._cgroup)

    def __call__(self, *arguments, check=True):
        return self.machine.run("podman", *self._folders, "--storage-driver", "vfs", *arguments, check=check)

    def create(self, name, command, *options):
        """Run a container; its handle."""
        where = ["--network", "overlay", "--cgroup-parent", f"/{self._cgroup}", "--rootfs", str(self.machine.root)]
        return self("run", "--detach", "--name", name, *options, *where, *command).stdout.strip()

    def reaches(self, name, address):
        """Whether a connection from a container comes to be answered."""
        return bool(self("exec", name, *_try(address), check=False).stdout)


class Containerd:
    """Debian's containerd, and ctr, which gives containers a network by CNI's default folders."""

    NAMESPACE = "silkbus-test"

    def __init__(self, machine):
        self.machine = machine
        self._socket = machine.folder / "containerd.sock"

    def __enter__(self):
        folder = self.machine.folder
        unused = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
        unused += [f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")]
        (folder / "containerd.toml").write_text(
            f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
            f"disabled_plugins = {json.dumps(unused)}\n"
            f'[grpc]\naddress = "{self._socket}"\n[ttrpc]\naddress = "{self._socket}.ttrpc"\n'
        )
        self._log = folder / "containerd.log"
        self._process = self.machine.start("containerd", "--config", str(folder / "containerd.toml"), log=self._log)
        eventually("containerd answers", lambda: self("version", check=False).returncode == 0)
        return self

    def __exit__(self, *_):
        for task in self("tasks", "ls", "--quiet", check=False).stdout.split():
            self.end(task)
        # Its shims end with their tasks.
        eventually("no task is left", lambda: not self("tasks", "ls", "--quiet", check=False).stdout.split())

    def __call__(self, *arguments, check=True):
        command = ("ctr", "--address", str(self._socket), "--namespace", self.NAMESPACE, *arguments)
        return self.machine.run(*command, check=check)

    def create(self, name, command):
        """Run a container, ctr staying with it, which removes its network when it has ended. Its handle."""
        where = ("--cni", "--rm", "--cgroup", "", "--rootfs", str(self.machine.root))
        ctr = ("ctr", "--address", str(self._socket), "--namespace", self.NAMESPACE)
        self.machine.start(*ctr, "run", *where, name, *command, log=self.machine.folder / f"{name}.log")
        return f"{self.NAMESPACE}-{name}"

    def end(self, name):
        self("tasks", "kill", "--signal", "KILL", name, check=False)

    def reaches(self, name, address):
        number = f"try-{time.monotonic_ns()}"
        return bool(self("tasks", "exec", "--exec-id", number, name, *_try(address), check=False).stdout)


def _try(address):
    """What prints the greeting of a server, if a connection to it comes about."""
    return BUSYBOX, "sh", "-c", f"{BUSYBOX} nc -w 3 {address} {PORT} </dev/null"


def remove_cgroups(name):
    """Remove the groups that a runtime made below this one, in every hierarchy."""
    for top in CGROUPS.glob(f"**/{name}"):
        for group in sorted((each for each in top.rglob("*") if each.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
        with contextlib.suppress(OSError):
            top.rmdir()
