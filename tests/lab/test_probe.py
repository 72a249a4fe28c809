"""Namespaces, processes and probes of the lab, on namespaces of their own with one veth between them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from compose.lab import namespaces, probe, processes
from compose.lab.probe import Watch, connect, target

pytestmark = pytest.mark.kernel

A, B = f"sbl{os.getpid()}-a", f"sbl{os.getpid()}-b"
ADDRESS_B = "172.31.251.2"


@pytest.fixture(scope="module", autouse=True)
def pair():
    try:
        for name in (A, B):
            namespaces.create(name)
        namespaces.configure(
            A,
            [
                f"link add veth0 type veth peer name veth0 netns {B}",
                "addr add 172.31.251.1/24 dev veth0",
                "link set veth0 up",
            ],
        )
        namespaces.configure(B, [f"addr add {ADDRESS_B}/24 dev veth0", "link set veth0 up"])
        yield
    finally:
        namespaces.end_processes([A, B], grace=0.2)
        for name in (A, B):
            namespaces.delete(name)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    log = tmp_path_factory.mktemp("app") / "app.log"
    process = processes.start(
        "app", probe.program("serve", "b-1", "8080", "9090"), namespace=B, log=log, environment={}
    )
    processes.wait_ready(process, lambda: None if "ready" in log.read_text() else "says nothing")
    yield process
    process.kill()


def rule(action, port):
    iptables = namespaces.inside(B, ["iptables-nft", action, "INPUT", "-p", "tcp", "--dport", str(port)])
    namespaces.run([*iptables, "-j", "REJECT", "--reject-with", "tcp-reset"])


@pytest.mark.usefixtures("app")
def test_outcomes_are_told_apart():
    drop = ["iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", "9090", "-j", "DROP"]
    namespaces.run(namespaces.inside(B, drop))
    targets = [target(ADDRESS_B, 8080), target(ADDRESS_B, 7), target(ADDRESS_B, 9090)]
    accepted, refused, lost = connect(A, targets, timeout=1)
    namespaces.run(namespaces.inside(B, ["iptables-nft", "-F"]))
    assert (accepted.verdict, accepted.by) == ("accepted", "b-1")
    assert (refused.verdict, refused.error) == ("refused", "ECONNREFUSED")
    assert lost.verdict == "timed out"


@pytest.mark.usefixtures("app")
def test_udp_is_answered():
    answered, refused = connect(A, [target(ADDRESS_B, 8080, "udp"), target(ADDRESS_B, 7, "udp")])
    assert (answered.verdict, answered.by) == ("accepted", "b-1")
    assert refused.verdict == "refused"


def test_nothing_to_try_is_no_process():
    assert connect("no-such-namespace", []) == []


def test_unknown_namespace_says_which():
    with pytest.raises(namespaces.CommandFailed, match="no-such-namespace"):
        connect("no-such-namespace", [target(ADDRESS_B, 8080)])


@pytest.mark.usefixtures("app")
def test_watch_tells_when_a_verdict_changes():
    with Watch(A, [target(ADDRESS_B, 8080), target(ADDRESS_B, 9090)]) as watch:
        time.sleep(0.1)
        before_refusal = time.monotonic()
        rule("-I", 8080)
        refusal = watch.wait_for(0, accepted=False, after=before_refusal)
        before_accept = time.monotonic()
        rule("-D", 8080)
        accept = watch.wait_for(0, accepted=True, after=before_accept)
    seen = watch.seen
    assert [transition.verdict for transition in seen.of(0)] == ["accepted", "refused", "accepted"]
    assert seen.of(0)[1:] == [refusal, accept]
    assert before_refusal < refusal.ended < before_accept < accept.ended
    assert seen.only("accepted", 1)
    assert seen.counts[0]["refused"] >= 1


@pytest.mark.usefixtures("app")
def test_a_lost_packet_is_seen_by_a_watch():
    with Watch(A, [target("172.31.251.77", 8080)], timeout=0.2) as watch:
        pass
    assert watch.seen.only("timed out")


def test_a_process_is_known_by_its_start(app):
    assert app.alive()
    impostor = processes.Process(app.name, app.pid, app.started - 1, app.log)
    assert not impostor.alive()
    impostor.stop()
    assert app.alive()
    assert processes.Process.decode(app.encode()) == app


def test_one_that_ends_while_starting_shows_its_log(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import sys; sys.exit('no such wheel')"]
    process = processes.start("wheel", command, namespace=A, log=log, environment={})
    with pytest.raises(processes.NotReady, match=r"wheel ended while starting(?s:.*)no such wheel"):
        processes.wait_ready(process, lambda: "not yet")


def test_one_that_never_gets_ready_says_what_is_missing(tmp_path):
    process = processes.start("sleeper", ["sleep", "60"], namespace=A, log=tmp_path / "log", environment={})
    with pytest.raises(processes.NotReady, match=r"sleeper is not ready after 0\.1 s: bed"):
        processes.wait_ready(process, lambda: "bed", timeout=0.1)
    process.stop()
    assert not process.alive()


def test_stop_kills_who_does_not_listen(tmp_path):
    log = tmp_path / "log"
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    process = processes.start("stubborn", [sys.executable, "-c", stubborn], namespace=A, log=log, environment={})
    processes.wait_ready(process, lambda: None if "deaf" in log.read_text() else "listens")
    process.stop(timeout=0.2)
    assert not process.alive()


def test_ending_a_namespace_spares_others(tmp_path):
    outside = subprocess.Popen(["sleep", "60"])
    inside = processes.start("sleeper", ["sleep", "60"], namespace=A, log=tmp_path / "log", environment={})
    try:
        deadline = time.monotonic() + 10
        while inside.pid not in namespaces.processes([A]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert namespaces.processes([A]) == {inside.pid: A}
        namespaces.end_processes([A])
        assert not inside.alive()
        assert outside.poll() is None
    finally:
        outside.send_signal(signal.SIGKILL)
        outside.wait()
