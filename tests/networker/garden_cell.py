"""A cell with Garden: its configuration, and the plugin as Guardian calls it.

The networker mounts namespaces, so it gets a mount namespace that outlives it and ends with the test.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.networker import install
from tests.networker.cell import PATIENCE, Cell, eventually

PLUGINS = Path("/usr/lib/cni")


@contextmanager
def mount_namespace() -> Iterator[list[str]]:
    """The command that starts a program in a mount namespace of its own."""
    own = Path("/proc/self/ns/mnt").stat().st_ino
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "infinity"]) as process:
        path = Path(f"/proc/{process.pid}/ns/mnt")
        try:
            eventually("the namespace exists", lambda: process.poll() is not None or path.stat().st_ino != own)
            yield ["nsenter", f"--mount={path}"]
        finally:
            process.kill()


class Garden:
    """Guardian's side of a cell."""

    def __init__(self, cell: Cell, enter: Sequence[str]) -> None:
        self.cell = cell
        self.host = ""
        self._enter = enter
        assert install.garden_main([str(cell.folder / "bin"), "--run-dir", str(cell.run_dir)]) == 0
        self.plugin = cell.folder / "bin" / "silkbus-garden"
        self.mounts = cell.folder / "netns"
        self.state = cell.folder / "state.json"
        self.cni = cell.folder / "cni.d"
        self.cni.mkdir()
        self.file = cell.folder / "adapter.json"
        self.config: dict[str, Any] = {
            "cni_plugin_dir": str(PLUGINS),
            "cni_config_dir": str(self.cni),
            "bind_mount_dir": str(self.mounts),
            "state_file": str(self.state),
            "start_port": 61000,
            "total_ports": 5,
            "log_prefix": "cfnetworking",
            "iptables_lock_file": str(cell.folder / "iptables.lock"),
            "proxy_port": 15001,
            "proxy_uid": 0,
            "search_domains": ["pivotal.io"],
        }
        self.configure()

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """For one test of many: what it leaves behind is removed."""
        config, neighbours = dict(self.config), self.cell.neighbours
        neighbours.calls.clear()
        yield
        neighbours.refuse.clear()
        shutil.rmtree(self.cni)
        self.cni.mkdir()
        self.configure(**{key: config.get(key) for key in self.config})
        for record in self.cell.records.all():
            self.call("down", record.handle)
        self.state.unlink(missing_ok=True)

    def configure(self, **changes: Any) -> None:
        self.config |= changes
        self.file.write_text(json.dumps({key: value for key, value in self.config.items() if value is not None}))

    def network(self, name: str, *plugins: dict[str, Any], version: str = "1.0.0") -> None:
        """Install a conflist."""
        content = {"cniVersion": version, "name": name, "plugins": plugins}
        (self.cni / f"10-{name}.conflist").write_text(json.dumps(content))

    def run(
        self, *arguments: str, stdin: bytes = b"", fd: int | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """The plugin with these arguments; `fd` becomes its descriptor 3."""
        command: list[str] = [str(self.plugin), *arguments]
        if fd is not None:
            command = ["sh", "-c", f'exec "$@" 3</proc/self/fd/{fd}', "sh", *command]
        passed = () if fd is None else (fd,)
        return subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE, pass_fds=passed, cwd=cwd)

    def call(self, action: str, handle: str = "h-1", body: Any = None) -> subprocess.CompletedProcess[bytes]:
        """One call as Guardian makes it."""
        arguments = (f"--configFile={self.file}", "--action", action, "--handle", handle)
        return self.run(*arguments, stdin=json.dumps(body).encode())

    def ok(self, action: str, handle: str = "h-1", body: Any = None) -> Any:
        done = self.call(action, handle, body)
        assert (done.returncode, done.stderr) == (0, b""), done
        return json.loads(done.stdout) if done.stdout else None

    def error(self, action: str, handle: str = "h-1", body: Any = None) -> str:
        done = self.call(action, handle, body)
        assert (done.returncode, done.stdout) == (1, b""), done
        lines = done.stderr.decode().splitlines()
        assert lines[-1].startswith("cfnetworking: ")
        return lines[-1].removeprefix("cfnetworking: ")

    def run_inside(self, netns: str, *command: str) -> str:
        """What a program prints in a container's namespace."""
        done = subprocess.run(["nsenter", f"--net={netns}", *command], capture_output=True, check=True, text=True)
        return done.stdout

    def ports(self) -> dict[str, list[int]]:
        """What the state file says."""
        found: dict[str, list[int]] = json.loads(self.state.read_text() or "{}").get("acquired_ports", {})
        return found

    def mounted(self) -> list[str]:
        """The handles whose namespaces are mounted."""
        listing = subprocess.run([*self._enter, "cat", "/proc/self/mounts"], capture_output=True, check=True, text=True)
        targets = [line.split()[1] for line in listing.stdout.splitlines()]
        return sorted(os.path.basename(target) for target in targets if Path(target).parent == self.mounts)  # noqa: PTH119

    def is_clean(self, handle: str = "h-1") -> bool:
        """Whether nothing is left of a handle."""
        return (
            self.cell.is_clean(handle)
            and handle not in self.mounted()
            and not (self.mounts / handle).exists()
            and (not self.state.exists() or handle not in self.ports())
        )


@contextmanager
def garden(netns: str, *more: str) -> Iterator[Garden]:
    """A cell with Garden; `more` are arguments of nsenter for what else the networker is to be in."""
    with mount_namespace() as enter, Cell(netns, enter=[*enter, *more]) as cell:
        yield Garden(cell, enter)
