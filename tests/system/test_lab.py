"""`silkbus lab …` as a person uses it: a lab that stands, is used by several commands, and goes without a trace."""

import os
import re
import signal
import subprocess

import pytest

from compose.lab import host, lifecycle, namespaces
from compose.lab.services import program
from compose.lab.state import Layout, State

pytestmark = pytest.mark.system

NAME = f"l{os.getpid()}"
TIMEOUT = 120


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    lifecycle.sweep()
    before = host.snapshot()
    yield
    lifecycle.destroy(Layout(NAME))
    assert host.snapshot() == before


def silkbus(*arguments, environment=None):
    variables = {**os.environ, **(environment or {})}
    return subprocess.run(
        [program("silkbus"), *arguments], env=variables, capture_output=True, text=True, timeout=TIMEOUT
    )


def lab(*arguments):
    return silkbus("lab", "--name", NAME, *arguments)


def worked(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_standing_lab():
    up = worked(lab("up", "--cells", "1"))
    exports = dict(re.findall(r"export (\w+)=(\S+)", up))
    assert "cell-1/enforcer" in up

    again = lab("up")
    assert again.returncode == 1
    assert f"lab {NAME} stands already" in again.stderr

    assert "web-0 on cell-1" in worked(lab("run", "web"))
    addresses = dict(re.findall(r"(api-\d) on cell-1 at (\S+)", worked(lab("run", "api", "--instances", "2"))))
    assert set(addresses) == {"api-0", "api-1"}

    worked(silkbus("add-network-policy", "web", "api", "--protocol", "tcp", "--port", "8080", environment=exports))
    assert re.search(r"web\s+api\s+tcp\s+8080", worked(silkbus("network-policies", environment=exports)))
    connect = "import socket, sys; print(socket.create_connection((sys.argv[1], 8080), 10).recv(99).decode())"
    command = ["exec", "web-0", "--", "python3", "-c", connect, addresses["api-1"]]
    assert worked(lab(*command)).strip() == "api-1"
    assert lab("exec", "web-0", "--", "sh", "-c", "exit 7").returncode == 7
    assert "silk-vtep" in worked(lab("exec", "cell-1", "--", "ip", "link"))

    assert re.search(r"web-0  -\s+8080\s+8080", worked(lab("matrix")))
    worked(lab("remove", "api-1"))
    status = worked(lab("status"))
    assert "api-0" in status
    assert "api-1" not in status

    State.load(Layout(NAME)).services["cell-1/networker"].kill()
    broken = lab("status")
    assert broken.returncode == 1
    assert "cell-1/networker" in broken.stdout

    worked(lab("down"))
    assert namespaces.names(f"sb-{NAME}-") == []
    worked(lab("down"))


def test_what_is_not_there_is_named():
    for arguments in (["status"], ["run", "web"], ["exec", "web-0", "--", "true"]):
        done = lab(*arguments)
        assert done.returncode == 1
        assert f"no lab {NAME} stands: start it with `silkbus lab up`" in done.stderr


def test_a_killed_up_is_a_leftover():
    killed = subprocess.Popen(
        [program("silkbus"), "lab", "--name", NAME, "up"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in killed.stdout:
        if "the centre" in line:
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert namespaces.processes(namespaces.names(f"sb-{NAME}-"))
    assert "no lab" in lab("status").stderr
    worked(lab("up", "--cells", "1"))
    worked(lab("down"))
    assert namespaces.names(f"sb-{NAME}-") == []
    assert not Layout(NAME).data.exists()
