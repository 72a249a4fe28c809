"""What policies do to real packets on a lab: between cells and within one, through all services."""

import subprocess

import pytest

from compose.lab import matrix, namespaces, probe
from compose.lab.calls import Rule
from compose.lab.matrix import Allowed
from compose.lab.probe import connect, target

pytestmark = pytest.mark.system

HOLD = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)
s.settimeout(10)
print(s.recv(100).decode().strip(), flush=True)
for line in sys.stdin:
    s.sendall(line.encode())
    print(s.recv(100).decode().strip() or "closed", flush=True)
"""


def taken(lab):
    return matrix.take(list(lab.state.apps.values()))


def test_nobody_reaches_anybody(lab):
    assert taken(lab).wrong([]) == []


@pytest.mark.usefixtures("policy")
def test_a_policy_opens_its_port_between_all_instances_and_nothing_else(lab):
    assert taken(lab).wrong([Allowed("web", "api", 8080, 8080)]) == []


def test_removed_policies_close(lab, gateway):
    rule = lab.rule("web", "api", 8080, 9090)
    lab.settle(gateway.add(rule).revision)
    assert taken(lab).wrong([Allowed("web", "api", 8080, 9090)]) == []
    lab.settle(gateway.remove(rule).revision)
    assert taken(lab).wrong([]) == []


def test_udp_is_its_own_protocol(lab, gateway):
    rule = Rule(lab.guid("web"), lab.guid("api"), 8080, 8080, "udp")
    lab.settle(gateway.add(rule).revision)
    for other in ("api-0", "api-1"):
        address = lab.container(other).address
        udp, tcp = connect(lab.container("web-0").namespace, [target(address, 8080, "udp"), target(address, 8080)])
        assert (udp.verdict, udp.by, tcp.accepted) == ("accepted", other, False)
    lab.settle(gateway.remove(rule).revision)


def test_instances_of_one_app_need_a_policy_too(lab, gateway):
    rule = lab.rule("web", "web", 9090)
    lab.settle(gateway.add(rule).revision)
    assert taken(lab).wrong([Allowed("web", "web", 9090, 9090)]) == []
    lab.settle(gateway.remove(rule).revision)


@pytest.mark.parametrize("destination", ["api-0", "api-1"])
def test_removing_a_policy_cuts_open_connections(lab, gateway, destination):
    rule = lab.rule("web", "api", 8080)
    lab.settle(gateway.add(rule).revision)
    source, address = lab.container("web-0").namespace, lab.container(destination).address
    line = [*probe.program()[:2], "-c", HOLD, address, "8080"]
    with subprocess.Popen(
        namespaces.inside(source, line),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdout.readline() == f"{destination}\n"
        client.stdin.write("hello\n")
        client.stdin.flush()
        assert client.stdout.readline() == "hello\n"
        lab.settle(gateway.remove(rule).revision)
        client.stdin.write("still there?\n")
        client.stdin.flush()
        said = client.stdout.readline()
        client.stdin.close()
        assert said in ("", "closed\n"), "an open connection survived the removal of its policy"


@pytest.mark.usefixtures("policy")
def test_a_removed_container_is_gone_and_its_address_is_not_used_at_once(lab):
    (made,) = lab.run_app("api", ["cell-1"])
    assert connect(lab.container("web-1").namespace, [target(made.address, 8080)])[0].by == made.handle
    lab.remove(made.handle)
    (again,) = lab.run_app("api", ["cell-1"])
    assert again.address != made.address
    assert not connect(lab.container("web-1").namespace, [target(made.address, 8080)], timeout=1)[0].accepted
    lab.remove(again.handle)


def test_the_command_line_does_it(lab, gateway):
    lab.cli("add-network-policy", "web", "api", "--protocol", "tcp", "--port", "8080")
    assert "web" in lab.cli("network-policies")
    lab.settle(gateway.revision())
    assert taken(lab).wrong([Allowed("web", "api", 8080, 8080)]) == []
    lab.cli("remove-network-policy", "web", "api", "--protocol", "tcp", "--port", "8080")
    lab.settle(gateway.revision())
    assert taken(lab).wrong([]) == []
