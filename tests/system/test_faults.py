"""Processes are killed at the worst moments; what the kernel does, and the end state, must be right."""

import shutil
import time

import pytest

from bus.tables.cache import load
from compose.lab import matrix, namespaces
from compose.lab.containers import CniError
from compose.lab.matrix import Allowed
from compose.lab.probe import Watch, connect, target

pytestmark = pytest.mark.system

OPEN = [Allowed("web", "api", 8080, 8080)]


def taken(lab):
    return matrix.take(list(lab.state.apps.values()))


def wait_until(condition, what, timeout=20):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.1)


@pytest.mark.usefixtures("policy")
def test_an_enforcer_that_is_killed_and_restarted_leaves_no_gap(lab):
    """A policy's port stays open and another stays closed: while it is dead, while it starts, and after."""
    api = lab.container("api-1").address
    lines = [target(api, 8080), target(api, 9090)]
    with (
        Watch(lab.container("web-0").namespace, lines, interval=0.01) as across,
        Watch(lab.container("web-1").namespace, lines, interval=0.01) as within,
    ):
        for cell in lab.state.cells:
            lab.kill(f"{cell}/enforcer")
        time.sleep(0.5)
        for cell in lab.state.cells:
            lab.start(f"{cell}/enforcer")
        time.sleep(2)
    for watch in (across, within):
        assert watch.seen.only("accepted", 0), watch.seen
        assert "accepted" not in watch.seen.counts[1], watch.seen
    assert taken(lab).wrong(OPEN) == []


def test_a_dead_enforcer_misses_nothing(lab, gateway):
    """What changes while it is dead is in the kernel once it is back."""
    rule = lab.rule("web", "api", 8080)
    lab.kill("cell-1/enforcer")
    revision = gateway.add(rule).revision
    lab.start("cell-1/enforcer")
    lab.settle(revision)
    assert taken(lab).wrong(OPEN) == []
    lab.kill("cell-1/enforcer")
    revision = gateway.remove(rule).revision
    lab.start("cell-1/enforcer")
    lab.settle(revision)
    assert taken(lab).wrong([]) == []


@pytest.mark.parametrize("point", ["policy.after-commit", "policy.after-publish"])
def test_a_policy_server_killed_after_its_commit_loses_nothing(lab, gateway, point):
    rule = lab.rule("web", "api", 8080)
    lab.stop("policy-server")
    lab.start("policy-server", SILKBUS_FAILPOINTS=f"{point}=kill")
    with pytest.raises(OSError, match=r"POST|onnection"):
        gateway.add(rule)
    wait_until(lambda: not lab.state.services["policy-server"].alive(), "the policy server's end")
    lab.start("policy-server")
    restarted = time.monotonic()
    lab.settle(gateway.revision())
    assert time.monotonic() - restarted < 15
    assert taken(lab).wrong(OPEN) == []
    lab.settle(gateway.remove(rule).revision)
    assert taken(lab).wrong([]) == []


@pytest.mark.parametrize(
    "armed",
    # Each start checks the flows, and so passes the last of these once before the removal does.
    ["enforcer.before-apply=kill", "enforcer.after-apply=kill", "enforcer.after-cut=kill:2"],
)
def test_an_enforcer_killed_in_the_middle_of_a_removal_ends_right(lab, gateway, armed):
    rule = lab.rule("web", "api", 8080)
    lab.settle(gateway.add(rule).revision)
    lab.kill("cell-2/enforcer")
    lab.start("cell-2/enforcer", SILKBUS_FAILPOINTS=armed)
    revision = gateway.remove(rule).revision
    wait_until(lambda: not lab.state.services["cell-2/enforcer"].alive(), "the enforcer's end")
    lab.start("cell-2/enforcer")
    lab.settle(revision)
    assert taken(lab).wrong([]) == []


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("point", ["networker.after-record", "networker.after-attach", "networker.after-admit"])
def test_a_networker_killed_in_the_middle_of_an_add(lab, point):
    """The runtime hears an error; after a restart nothing of the attempt is left, and it can be made again."""
    lab.kill("cell-1/networker")
    lab.start("cell-1/networker", SILKBUS_FAILPOINTS=f"{point}=kill")
    with pytest.raises(CniError) as failed:
        lab.run_app("api", ["cell-1"])
    assert failed.value.code == 11
    lab.start("cell-1/networker")
    records = lab.layout.cell_state("cell-1") / "containers"
    wait_until(lambda: len(list(records.glob("*.json"))) == 2, "the sweep of the half-made container")
    (made,) = lab.run_app("api", ["cell-1"])
    assert taken(lab).wrong(OPEN) == []
    lab.remove(made.handle)


def test_strangers_rules_survive(lab, gateway):
    """A chain and a rule of somebody else's outlive our start, changes and a kill."""
    cell = lab.layout.namespace("cell-1")

    def iptables(*arguments):
        return namespaces.run(namespaces.inside(cell, ["iptables-nft", "-w", *arguments]))

    iptables("-N", "stranger")
    iptables("-A", "stranger", "-d", "203.0.113.7/32", "-j", "DROP")
    iptables("-I", "FORWARD", "-j", "stranger")
    lines = [line for line in iptables("-S").splitlines() if "stranger" in line]
    rule = lab.rule("web", "api", 8080)
    lab.settle(gateway.add(rule).revision)
    lab.kill("cell-1/enforcer")
    lab.start("cell-1/enforcer")
    lab.settle(gateway.remove(rule).revision)
    assert [line for line in iptables("-S").splitlines() if "stranger" in line] == lines
    iptables("-D", "FORWARD", "-j", "stranger")
    iptables("-F", "stranger")
    iptables("-X", "stranger")


def test_without_bus_and_centre(lab, gateway):
    """A container that starts then: with a warm cache it has its policies, with a cold one it may talk to nobody."""
    revision = gateway.add(lab.rule("web", "api", 8080)).revision
    lab.settle(revision)
    cache = lab.layout.cell_state("cell-1") / "cache" / "enforcer" / "policies.table"
    # It is written some 50 ms after a change.
    wait_until(lambda: (kept := load(cache, "policies")) and kept.content.revision >= revision, "the enforcer's cache")
    centre = ("policy-server", "silk-controller", "nats")
    for name in centre:
        lab.kill(name)

    (running,) = lab.run_app("api", ["cell-1"])
    assert connect(lab.container("web-0").namespace, [target(running.address, 8080)])[0].by == running.handle

    lab.kill("cell-1/enforcer")
    lab.start("cell-1/enforcer")
    (warm,) = lab.run_app("api", ["cell-1"])
    assert taken(lab).wrong(OPEN) == []

    lab.kill("cell-1/enforcer")
    shutil.rmtree(lab.layout.cell_state("cell-1") / "cache" / "enforcer")
    lab.start("cell-1/enforcer")
    (cold,) = lab.run_app("api", ["cell-1"])
    opened, refused = connect(lab.container("web-1").namespace, [target(a, 8080) for a in ("127.0.0.1", cold.address)])
    assert opened.by == "web-1"
    assert not refused.accepted

    for name in reversed(centre):
        lab.start(name)
    lab.settle(gateway.revision())
    assert taken(lab).wrong(OPEN) == []
    for container in (running, warm, cold):
        lab.remove(container.handle)
    lab.settle(gateway.remove(lab.rule("web", "api", 8080)).revision)
    assert taken(lab).wrong([]) == []
