"""A Docker daemon of the tests' own: in namespaces of its own, from Debian's packages unpacked into a folder.

Nothing is installed, for the package would start a daemon in the host's network namespace, whose bridge and iptables
rules are the host's then. All that a daemon does to networks stays in its namespace, and ends with it.
"""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

CACHE = Path("/var/cache/silkbus-tests")
"""Packages and the base image, kept for the next run: they take a minute, and change seldom."""
PACKAGES = (
    *("docker.io", "containerd", "runc", "tini", "docker-compose"),
    *("mmdebstrap", "python3-certifi", "python3-charset-normalizer", "python3-idna", "python3-urllib3"),
    *("python3-chardet", "python3-requests", "python3-websocket", "python3-docker", "python3-dockerpty"),
    *("python3-docopt", "python3-dotenv", "python3-attr", "python3-pyrsistent", "python3-jsonschema"),
    *("python3-texttable", "python3-yaml", "python3-six", "python3-distutils", "python3-lib2to3"),
    *("python3-setuptools", "python3-pkg-resources"),
)
CGROUP = "silkbus-test"
START_SECONDS = 60.0

# The cgroups as the host has them, mounted anew: /sys is that of the new network namespace.
START = """
set -eu
mount --make-rprivate /
mount -t proc proc /proc
ip link set lo up
version2=; [ ! -e /sys/fs/cgroup/cgroup.controllers ] || version2=1
mount -t sysfs sysfs /sys
if [ "$version2" ]; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
  mount -t tmpfs tmpfs /sys/fs/cgroup
  for name in cpu cpuacct cpuset memory devices freezer blkio pids; do
    mkdir /sys/fs/cgroup/$name
    mount -t cgroup -o $name cgroup /sys/fs/cgroup/$name
  done
  # runc knows processes by what /proc/PID/cgroup lists, and this hierarchy is listed.
  mkdir /sys/fs/cgroup/systemd
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi
mount -t tmpfs tmpfs /run
export XTABLES_LOCKFILE=/run/xtables.lock
exec dockerd --data-root "$FOLDER/data" --exec-root /run/docker --pidfile /run/docker.pid \
  --host "unix://$FOLDER/docker.sock" --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "$CGROUP"
"""


class Unavailable(Exception):
    """Docker cannot run here; the text says why."""


def packages() -> Path:
    """The folder with the unpacked packages. Raises Unavailable."""
    root = CACHE / "docker"
    if root.exists():
        return root
    debs, new = CACHE / "debs", CACHE / "docker.new"
    for folder in (debs, new):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
            subprocess.run(["apt-get", "-qq", "update"], check=True, capture_output=True, text=True, timeout=120)
        command = ["apt-get", "-qq", "-o", "Acquire::Retries=3", "download", *PACKAGES]
        subprocess.run(command, cwd=debs, check=True, capture_output=True, text=True, timeout=240)
        for deb in debs.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(deb), str(new)], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"Docker's Debian packages cannot be had: {error}: {getattr(error, 'stderr', '')}") from None
    shutil.rmtree(debs)
    new.rename(root)
    return root


class Dockerd:
    """The daemon, and the commands `docker` and `docker-compose` that speak to it."""

    def __init__(self, folder: Path) -> None:
        """`folder` must have a short path: it holds a socket."""
        self.folder = folder
        self.root = packages()
        path = f"{self.root}/usr/bin:{self.root}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.environment = {
            "PATH": path,
            "HOME": str(folder),
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "PYTHONPATH": f"{self.root}/usr/lib/python3/dist-packages",
            "LANG": "C.UTF-8",
            "FOLDER": str(folder),
            "CGROUP": CGROUP,
        }
        self.log = folder / "dockerd.log"

    def start(self) -> None:
        """Start it and wait until it answers. Raises Unavailable, with the end of its log."""
        flags = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--propagation", "private"]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                ["unshare", *flags, "bash", "-c", START], stdout=output, stderr=output, env=self.environment
            )
        deadline = time.monotonic() + START_SECONDS
        while self.docker("info", check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise Unavailable(f"dockerd does not run here:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)
        pid = self._process.pid
        self.pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def docker(self, *arguments: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return self.run([f"{self.root}/usr/bin/docker", *arguments], check=check, timeout=timeout)

    def run(
        self, command: list[str], *, check: bool = True, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the machine's against this daemon; with `check` it must succeed."""
        variables = {**self.environment, **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def kill(self, pid: int) -> None:
        """SIGKILL to a process by the number that the daemon knows it by: it is in the daemon's PID namespace."""
        subprocess.run(["nsenter", "--target", str(self.pid), "--pid", "kill", "-9", str(pid)], check=True, timeout=30)

    def stop(self) -> None:
        """End it and whatever it runs: with the first process of its PID namespace all others end."""
        self._process.kill()
        self._process.wait()
        # Cgroups are the kernel's, not of a namespace; they can be removed once they are empty.
        for _ in range(50):
            for top in Path("/sys/fs/cgroup").glob(f"**/{CGROUP}"):
                for folder, _, _ in os.walk(top, topdown=False):
                    with contextlib.suppress(OSError):
                        Path(folder).rmdir()
            if not any(Path("/sys/fs/cgroup").glob(f"**/{CGROUP}")):
                break
            time.sleep(0.1)
