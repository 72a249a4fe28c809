"""The command line against a lab: waiting, explaining with probes, and the doctor on a cell that is well and is not."""

import json
import os
import subprocess

import pytest

from compose.lab import namespaces, processes, services

pytestmark = pytest.mark.system

CELL = "cell-1"
FRAMES = ["-p", "udp", "--dport", "4789", "-m", "length", "--length", "1200:65535", "-j", "DROP"]


def silkbus(lab, *arguments):
    """Exit code, output and errors of silkbus."""
    done = subprocess.run(
        [services.program("silkbus"), *arguments],
        env={**os.environ, **lab.cli_environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def on_cell(lab, *command):
    """Runs a command in the cell's network namespace, with the environment of its services."""
    environment = services.service(f"{CELL}/enforcer", lab.layout, lab.state).environment
    return subprocess.run(
        namespaces.inside(lab.layout.namespace(CELL), command),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def doctor(lab, *arguments):
    """Exit code, and what is not as it should be: levels and texts by check."""
    done = on_cell(lab, services.program("silkbus"), "doctor", "-o", "json", *arguments)
    assert done.returncode in (0, 1), done.stderr
    wrong = {}
    for finding in json.loads(done.stdout)["findings"]:
        if finding["level"] == "wrong":
            wrong.setdefault(finding["check"], []).append(finding["what"])
    return done.returncode, wrong


def test_a_change_is_waited_for_and_explained(lab):
    code, out, _ = silkbus(lab, "explain", "web", "api", "--port", "8080")
    assert code == 1
    assert out.startswith("Not allowed: lab/lab/web → lab/lab/api tcp 8080")
    code, out, err = silkbus(lab, "add-network-policy", "web", "api", "--wait")
    assert (code, err) == (0, "")
    assert "is enforced on 2 cells.\nOK" in out
    code, out, err = silkbus(lab, "explain", "web", "api", "--port", "8080", "--probe", "--output", "json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["contradictions"] == []
    assert {instance["handle"] for instance in answer["destination"]["instances"]} == {"api-0", "api-1"}
    probes = [probe for instance in answer["source"]["instances"] for probe in instance["probes"]]
    assert [probe["outcome"] for probe in probes] == ["connected"] * 4
    assert silkbus(lab, "remove-network-policy", "web", "api", "--protocol", "tcp", "--port", "8080", "--wait")[0] == 0
    assert silkbus(lab, "explain", "web", "api", "--port", "8080", "--probe")[0] == 1


@pytest.mark.usefixtures("policy")
def test_where_model_and_packets_disagree_is_said(lab):
    """Somebody else's rule, at a place that is not the enforcer's: only the probe can tell."""
    rule = ["FORWARD", "-d", "10.254.0.0/16", "-j", "DROP"]
    iptables = f"iptables-{lab.state.iptables.replace('auto', 'nft')}"
    assert on_cell(lab, iptables, "-t", "mangle", "-A", *rule).returncode == 0
    try:
        code, out, _ = silkbus(lab, "explain", "web", "api", "--port", "8080", "--probe")
    finally:
        on_cell(lab, iptables, "-t", "mangle", "-D", *rule)
    assert code == 3
    assert "Contradiction: Tried from web-0 to " in out
    assert ": timeout, while the verdict there is passes" in out


def test_the_doctor_finds_a_service_that_ended(lab):
    lab.kill(f"{CELL}/enforcer")
    code, wrong = doctor(lab)
    lab.start(f"{CELL}/enforcer")
    assert code == 1
    assert any(text.startswith("enforcer: does not answer") for text in wrong["services"])


@pytest.mark.usefixtures("policy")
def test_the_doctor_finds_nothing_wrong_with_a_cell_that_is_well(lab):
    address = lab.container("api-1").address
    assert doctor(lab, "--through", "web-0", "--to", f"{address}:8080") == (0, {})


@pytest.mark.usefixtures("policy")
def test_the_doctor_finds_a_network_that_loses_large_packets(lab):
    """As cards do whose offload is broken: small packets of the tunnel pass, large ones are lost."""
    kind = lab.state.iptables.replace("auto", "nft")
    address = lab.container("api-1").address
    on_cell(lab, f"iptables-{kind}", "-A", "OUTPUT", *FRAMES)
    try:
        code, wrong = doctor(lab, "--through", "web-0", "--to", f"{address}:8080")
    finally:
        on_cell(lab, f"iptables-{kind}", "-D", "OUTPUT", *FRAMES)
    assert code == 1
    assert any("small packets arrive" in text for text in wrong["offload"])


def test_the_doctor_finds_a_centre_that_is_away(lab):
    lab.kill("policy-server")
    code, wrong = doctor(lab)
    assert code == 1
    assert wrong["bus"] == ["no policy server is heard: policies are as they were last known, and nothing changes"]
    lab.start("policy-server")
    processes.wait_ready(
        lab.state.services["policy-server"], lambda: None if silkbus(lab, "status")[0] == 0 else "no status", timeout=60
    )
