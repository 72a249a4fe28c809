"""The demo as a person runs it: its verdict, that a wrong one is noticed, and that nothing is left, however it ends."""

import os
import signal
import subprocess
import time

import pytest

from compose.lab import host, lifecycle, namespaces
from compose.lab.services import program
from compose.lab.state import Layout

pytestmark = pytest.mark.system

NAME = f"d{os.getpid()}"
TIMEOUT = 240


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    lifecycle.sweep()
    yield
    lifecycle.destroy(Layout(NAME))


def command(*arguments):
    return [program("silkbus"), "demo", "--name", NAME, *arguments]


def demo(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=TIMEOUT)


def started(until):
    """A demo that has come to the line with this text."""
    process = subprocess.Popen(command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = ""
    for line in process.stdout:
        seen += line
        if until in line:
            return process
    pytest.fail(f"the demo ended without {until!r}:\n{seen}")


def test_killed_in_the_middle_then_run_again():
    before = host.snapshot()
    killed = started("$ silkbus add-network-policy")
    killed.kill()
    killed.communicate()
    assert namespaces.names(f"sb-{NAME}-"), "the kill came too late to leave anything"

    done = demo("--rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert host.snapshot() == before
    assert namespaces.names(f"sb-{NAME}-") == []
    assert not Layout(NAME).run.exists()
    assert not Layout(NAME).data.exists()
    for text in ("Before: no policies", "After adding them", "After removing them", "every verdict was as expected"):
        assert text in done.stdout
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout


def test_a_wrong_verdict_is_noticed():
    done = demo("--rounds", "1", "--sabotage")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cache-0 -> db-0 port 8080: is open, though no policy allows it" in done.stdout
    assert namespaces.names(f"sb-{NAME}-") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(number):
    process = started("the centre")
    time.sleep(0.3)
    process.send_signal(number)
    text, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, text
    assert "interrupted; the lab is removed" in text
    assert namespaces.names(f"sb-{NAME}-") == []
    assert not Layout(NAME).run.exists()
