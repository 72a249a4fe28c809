"""What a service process tells systemd, heard on a real notification socket."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE = 60.0


class Listener:
    """The socket on which systemd would hear. `name` is what NOTIFY_SOCKET says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)

    def hear(self, within: float = PATIENCE) -> str | None:
        """The next message, or None."""
        self._socket.settimeout(within)
        try:
            return self._socket.recv(4096).decode()
        except TimeoutError:
            return None

    def wait_for(self, message: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.hear() == message:
                return
        raise AssertionError(f"{message} was never said")

    def silent(self, seconds: float) -> bool:
        """Whether there comes a time of so many seconds in which nothing is said."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.hear(seconds) is None:
                return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@silkbus-test-{os.getpid()}"
    listener = Listener(name)
    yield listener
    listener.close()


def service(body: str, **environment: str) -> subprocess.Popen[bytes]:
    """A process with the frame of our services, whose main is `body`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = f"import asyncio, time\nfrom bus import process, watchdog\nasync def main():\n{lines}\nprocess.run(main)"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment})


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()


def test_ready_then_signs_of_life_then_stopping(listener: Listener) -> None:
    process = service(
        "watchdog.ready()\nawait asyncio.sleep(3600)", NOTIFY_SOCKET=listener.name, WATCHDOG_USEC="300000"
    )
    try:
        heard = {listener.hear() for _ in range(6)}
        assert heard == {"READY=1", "WATCHDOG=1"}
        process.send_signal(signal.SIGTERM)
        listener.wait_for("STOPPING=1")
    finally:
        code = ended(process)
    assert code == 0


def test_a_loop_that_hangs_gives_no_sign(listener: Listener) -> None:
    """The process and its threads live on; only the loop does not."""
    process = service(
        "await asyncio.sleep(1)\nwatchdog.ready()\ntime.sleep(3600)",
        NOTIFY_SOCKET=listener.name,
        WATCHDOG_USEC="300000",
    )
    try:
        listener.wait_for("WATCHDOG=1")
        listener.wait_for("READY=1")
        assert listener.silent(2.0)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}],
    ids=["none", "zero", "malformed", "of another process"],
)
def test_nobody_who_does_not_ask_gets_signs_of_life(tmp_path: Path, environment: dict[str, str]) -> None:
    listener = Listener(str(tmp_path / "notify"))
    process = service("await asyncio.sleep(0.5)\nwatchdog.ready()", NOTIFY_SOCKET=listener.name, **environment)
    assert ended(process) == 0
    assert listener.hear() == "READY=1"
    assert listener.hear(0.1) is None
    listener.close()


@pytest.mark.parametrize("name", ["", "/nowhere/notify"])
def test_a_service_does_not_depend_on_who_watches_it(name: str) -> None:
    process = service("watchdog.ready()", NOTIFY_SOCKET=name, WATCHDOG_USEC="100000")
    assert ended(process) == 0


def test_one_whom_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    """A datagram socket holds a few messages; the service must not block on the next."""
    listener = Listener(str(tmp_path / "notify"))
    process = service("for _ in range(2000):\n    watchdog.ready()", NOTIFY_SOCKET=listener.name)
    assert ended(process) == 0
    listener.close()
