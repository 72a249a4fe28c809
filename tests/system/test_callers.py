"""Container runtimes from packages run containers on the lab's overlay: podman, and containerd by ctr.

Policies hold between their containers, and between those and others, and nothing is left of them.
"""

import pytest

from compose.lab import namespaces
from compose.lab.probe import connect, target
from tests.system.callers import PORT, SERVE, WAIT, Containerd, Machine, Podman, eventually

pytestmark = pytest.mark.system


def reaches(lab, name, address):
    """Whether a container of the lab's own reaches that address."""
    return connect(lab.container(name).namespace, [target(address, PORT)])[0].verdict == "accepted"


def hold_policies(lab, gateway, inside, address):
    """No policy, a policy web -> api, and none again, from the same cell and from the other.

    `address` is that of the runtime's container of api; `inside(address)`: whether its container of web reaches that.
    """

    def verdicts():
        own = [inside(each) for each in (address, lab.container("api-1").address, lab.container("web-1").address)]
        return own + [reaches(lab, name, address) for name in ("web-0", "web-1", "api-0", "api-1")]

    assert verdicts() == [False] * 7
    rule = lab.rule("web", "api", PORT)
    lab.settle(gateway.add(rule).revision)
    assert verdicts() == [True, True, False, True, True, False, False]
    lab.settle(gateway.remove(rule).revision)
    assert verdicts() == [False] * 7


def test_podman(lab, gateway, tmp_path):
    with Machine(lab, "cell-1", tmp_path) as machine, Podman(machine) as podman:
        machine.network(apps={"pod-web": lab.guid("web"), "pod-api": lab.guid("api")})
        links = machine.links()
        handles = {name: podman.create(name, command) for name, command in (("pod-api", SERVE), ("pod-web", WAIT))}
        assert machine.records() == set(handles.values())
        address = machine.address(handles["pod-api"])
        told = podman("inspect", "pod-api", "--format", "{{.NetworkSettings.Networks.overlay.IPAddress}}").stdout
        assert told == f"{address}\n"
        hold_policies(lab, gateway, lambda target: podman.reaches("pod-web", target), address)
        for name in handles:
            podman("rm", "--force", "--time", "0", name)
        assert machine.records() == set()
        assert machine.links() == links
    assert namespaces.names("cni-") == []


def test_containerd(lab, gateway, tmp_path):
    with Machine(lab, "cell-1", tmp_path) as machine, Containerd(machine) as ctr:
        links = machine.links()
        handles = {}
        for name, command in (("api", SERVE), ("web", WAIT)):
            machine.network(app=lab.guid(name))
            handles[name] = ctr.create(f"ctr-{name}", command)
            eventually(f"{name} is attached", lambda handle=handles[name]: machine.address(handle))
        assert machine.records() == set(handles.values())
        hold_policies(lab, gateway, lambda target: ctr.reaches("ctr-web", target), machine.address(handles["api"]))
        for name in handles:
            ctr.end(f"ctr-{name}")
        eventually("ctr had the network removed", lambda: machine.records() == set())
        assert machine.links() == links
