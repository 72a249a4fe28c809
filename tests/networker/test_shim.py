"""The plugin as a runtime runs it: a process with CNI_* variables, a configuration on stdin, JSON on stdout."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.networker import install
from tests.networker.cell import PATIENCE, Cell

CONFIG = {"cniVersion": "1.0.0", "name": "overlay", "type": "silkbus-cni"}
ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/none",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
}


class Shim:
    """An installed plugin."""

    def __init__(self, folder: Path, run_dir: Path, timeout: float = PATIENCE) -> None:
        assert install.main([str(folder), "--run-dir", str(run_dir), "--timeout", str(timeout)]) == 0
        self.path = folder / "silkbus-cni"

    def __call__(
        self, stdin: bytes | None = None, *, user: str | None = None, **environment: str | None
    ) -> subprocess.CompletedProcess[bytes]:
        variables = {name: value for name, value in (ENVIRONMENT | environment).items() if value is not None}
        data = json.dumps(CONFIG).encode() if stdin is None else stdin
        return subprocess.run([self.path], input=data, env=variables, capture_output=True, timeout=PATIENCE, user=user)

    def error(self, stdin: bytes | None = None, **environment: str | None) -> dict[str, Any]:
        done = self(stdin, **environment)
        assert (done.returncode, done.stderr) == (1, b"")
        error: dict[str, Any] = json.loads(done.stdout)
        assert set(error) <= {"cniVersion", "code", "msg", "details"}
        return error


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder: a Unix socket's path has at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="sbn-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shim(folder: Path) -> Shim:
    return Shim(folder / "bin", folder / "run")


@pytest.fixture
def listener(folder: Path) -> Iterator[socket.socket]:
    path = folder / "run" / "networker" / "networker.sock"
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


@pytest.mark.parametrize(("stdin", "version"), [(b'{"cniVersion": "0.4.0"}', "0.4.0"), (b"", "1.1.0"), (b"{", "1.1.0")])
def test_version_without_a_networker(shim: Shim, stdin: bytes, version: str) -> None:
    done = shim(stdin, CNI_COMMAND="VERSION", CNI_CONTAINERID=None, CNI_NETNS="dummy", CNI_IFNAME=None, CNI_PATH=None)
    assert (done.returncode, done.stderr) == (0, b"")
    supported = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert json.loads(done.stdout) == {"cniVersion": version, "supportedVersions": supported}


def test_without_a_command(shim: Shim) -> None:
    done = shim(CNI_COMMAND=None)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"silkbus-cni" in done.stderr


def test_networker_down(shim: Shim) -> None:
    error = shim.error()
    assert error["code"] == 11
    assert "start silkbus-networker" in error["msg"]
    assert "/run/networker/networker.sock" in error["msg"]


@pytest.mark.usefixtures("listener")
def test_networker_hanging(folder: Path) -> None:
    error = Shim(folder / "bin", folder / "run", timeout=0.5).error()
    assert error["code"] == 11
    assert "did not answer within 0.5 s" in error["msg"]


def test_stdin_that_never_ends(folder: Path) -> None:
    shim = Shim(folder / "bin", folder / "run", timeout=0.5)
    reading, writing = os.pipe()
    try:
        done = subprocess.run([shim.path], stdin=reading, env=ENVIRONMENT, capture_output=True, timeout=PATIENCE)
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 1
    assert "standard input did not end" in json.loads(done.stdout)["msg"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b'HTTP/1.1 200 OK\r\n\r\n{"exit": 0, "stdo',
        b"HTTP/1.1 200 OK\r\n\r\n[]",
        b'HTTP/1.1 200 OK\r\n\r\n{"exit": "x", "stdout": ""}',
        b'HTTP/1.1 500 Oh\r\n\r\n{"exit": 0, "stdout": ""}',
        b"\xff\x00",
    ],
)
def test_answers_that_are_none(shim: Shim, listener: socket.socket, answer: bytes) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    assert shim.error()["code"] == 11
    thread.join(PATIENCE)


def test_error_of_the_service_is_passed_on(shim: Shim, listener: socket.socket) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b'HTTP/1.1 500 Oh\r\n\r\n{"error": "disk full \\u00e4"}')

    thread = threading.Thread(target=serve)
    thread.start()
    assert shim.error()["msg"] == "disk full ä"
    thread.join(PATIENCE)


def test_stdin_too_long(shim: Shim) -> None:
    error = shim.error(b" " * ((1 << 20) + 1))
    assert (error["code"], "1048576" in error["msg"]) == (6, True)


def test_stdin_not_utf8(shim: Shim) -> None:
    assert shim.error(b"\xff{}")["code"] == 6


def test_a_reader_that_has_gone(shim: Shim) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [shim.path], input=b"{}", env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE, timeout=PATIENCE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.kernel
class TestThroughTheNetworker:
    @pytest.fixture
    def cell(self, netns: str) -> Iterator[Cell]:
        with Cell(netns) as cell:
            cell.start()
            yield cell

    @pytest.fixture
    def shim(self, cell: Cell) -> Shim:
        return Shim(cell.folder / "bin", cell.run_dir)

    def test_add_and_del(self, cell: Cell, shim: Shim) -> None:
        done = shim(CNI_NETNS=cell.netns, CNI_ARGS="SILKBUS_APP=web-ä")
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(done.stdout)["ips"][0]["address"] == "10.255.30.2/32"
        assert cell.neighbours.admitted["c1"]["app"] == "web-ä"
        done = shim(CNI_COMMAND="DEL", CNI_NETNS=None)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert cell.is_clean()

    @pytest.mark.parametrize("variable", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"])
    def test_missing_variable(self, shim: Shim, variable: str) -> None:
        error = shim.error(**{variable: None})
        assert error["code"] == 4
        assert error["msg"] == f"required env variables [{variable}] missing"

    @pytest.mark.parametrize("stdin", [b"", b"{", b"nonsense", b"\x00" * 1000, b"[" * (1 << 20), b"\x01" * (1 << 20)])
    def test_junk(self, shim: Shim, stdin: bytes) -> None:
        assert shim.error(stdin)["code"] == 6

    def test_longest_stdin(self, cell: Cell, shim: Shim) -> None:
        text = json.dumps(CONFIG).encode()
        assert shim(text + b"\n" * ((1 << 20) - len(text)), CNI_NETNS=cell.netns).returncode == 0

    def test_others_get_nothing(self, cell: Cell, shim: Shim) -> None:
        for path in (cell.folder, cell.run_dir):
            path.chmod(0o755)
        done = shim(user="nobody", CNI_NETNS=cell.netns)
        assert done.returncode == 1
        assert json.loads(done.stdout)["code"] == 5
        # Not by the folder's mode alone: let in as far as the socket, they are cut off before they are read.
        cell.socket.parent.chmod(0o755)
        cell.socket.chmod(0o666)
        done = shim(user="nobody", CNI_NETNS=cell.netns)
        assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 11)
        assert cell.records.all() == []
        assert cell.neighbours.calls == []

    def test_what_podman_really_sends(self, cell: Cell, shim: Shim) -> None:
        recording = Path(__file__).parent / "data" / "podman.jsonl"
        for line in recording.read_text().splitlines():
            call = json.loads(line)
            environment = call["env"]
            if environment["CNI_COMMAND"] == "ADD":
                environment["CNI_NETNS"] = cell.netns
            done = shim(json.dumps(call["stdin"]).encode(), **environment)
            assert (done.returncode, done.stderr) == (0, b""), done.stdout
            handle = environment["CNI_CONTAINERID"]
            match environment["CNI_COMMAND"]:
                case "ADD":
                    assert json.loads(done.stdout)["cniVersion"] == "1.0.0"
                    assert handle in cell.neighbours.admitted
                case "DEL":
                    assert cell.is_clean(handle)
                case "VERSION":
                    assert "1.0.0" in json.loads(done.stdout)["supportedVersions"]
