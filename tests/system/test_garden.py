"""Containers of Garden's on the lab's cells, attached by us or by another CNI plugin: policies hold for both alike."""

import contextlib
import ipaddress
import json
import os
import subprocess

import pytest

from compose.lab import calls, namespaces, probe, processes
from compose.lab.containers import PORTS
from compose.lab.probe import connect, target
from services.networker import install

pytestmark = pytest.mark.system


class Guardian:
    """Garden on one cell of the lab."""

    def __init__(self, lab, cell, folder):
        self.lab, self.cell, self.folder = lab, cell, folder
        assert install.garden_main([str(folder), "--run-dir", str(lab.layout.cell_run(cell))]) == 0
        (folder / "cni.d").mkdir()
        self.file = folder / "adapter.json"
        config = {
            "cni_plugin_dir": "/usr/lib/cni",
            "cni_config_dir": str(folder / "cni.d"),
            "bind_mount_dir": str(folder / "netns"),
            "state_file": str(folder / "state.json"),
            "start_port": 61000,
            "total_ports": 10,
            "log_prefix": "cfnetworking",
            "iptables_lock_file": str(folder / "lock"),
            "proxy_port": 15001,
            "proxy_uid": 0,
        }
        self.file.write_text(json.dumps(config))

    def network(self, *plugins):
        content = {"cniVersion": "1.0.0", "name": "theirs", "plugins": plugins}
        (self.folder / "cni.d" / "10.conflist").write_text(json.dumps(content))

    def call(self, action, handle, body, namespace):
        """One call, the container's namespace as descriptor 3."""
        descriptor = os.open(namespaces.path(namespace), os.O_RDONLY)
        command = [str(self.folder / "silkbus-garden"), f"--configFile={self.file}", "--action", action]
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" 3</proc/self/fd/{descriptor}', "sh", *command, "--handle", handle],
            input=json.dumps(body).encode(),
            capture_output=True,
            timeout=70,
            pass_fds=(descriptor,),
        )
        os.close(descriptor)
        assert done.returncode == 0, done
        return json.loads(done.stdout) if done.stdout else None

    @contextlib.contextmanager
    def container(self, handle, app, **more):
        """A container whose app listens; its namespace and its address."""
        namespace = self.lab.layout.namespace(handle)
        namespaces.create(namespace)
        try:
            properties = {"policy_group_id": self.lab.guid(app), "space_id": "lab", "container_workload": "app"}
            answer = self.call("up", handle, {"Properties": properties, **more}, namespace)
            log = self.lab.layout.log(handle)
            command = probe.program("serve", handle, *map(str, PORTS))
            process = processes.start(handle, command, namespace=namespace, log=log, environment={})
            processes.wait_ready(process, lambda: None if "ready" in log.read_text() else "does not listen yet")
            yield namespace, answer["properties"]
        finally:
            namespaces.end_processes([namespace], grace=0)
            self.call("down", handle, None, namespace)
            namespaces.delete(namespace)


@pytest.fixture
def guardian(lab, tmp_path):
    return Guardian(lab, "cell-1", tmp_path)


def subnet(lab):
    """The subnet of cell-1."""
    _, text = calls.get(lab.layout.cell_run("cell-1") / "silk" / "silk.sock", "/")
    return ipaddress.IPv4Network(json.loads(text)["overlay_subnet"])


def verdicts(lab, address):
    """Who reaches ports 8080 and 9090 of a new container: the apps web and api, on its cell and on the other."""
    lines = [target(address, 8080), target(address, 9090)]
    return {
        name: [outcome.verdict == "accepted" for outcome in connect(lab.container(name).namespace, lines)]
        for name in ("web-0", "web-1", "api-0", "api-1")
    }


NOBODY = [False, False]


@pytest.mark.parametrize("attached_by", ["silk", "ptp", "bridge"])
def test_policies_hold_for_garden_s_containers(lab, gateway, guardian, attached_by):
    # A part of the cell's subnet: the bridge has an address and a route of its own there.
    ranges = [[{"subnet": str(list(subnet(lab).subnets(new_prefix=26))[-1])}]]
    ipam = {"type": "host-local", "dataDir": str(guardian.folder / "ipam"), "ranges": ranges}
    routes = {"routes": [{"dst": "0.0.0.0/0"}]}
    if attached_by == "ptp":
        guardian.network({"type": "ptp", "ipam": ipam | routes})
    if attached_by == "bridge":
        guardian.network({"type": "bridge", "bridge": "theirs0", "isGateway": True, "ipam": ipam | routes})
    with guardian.container(f"garden-{attached_by}", "api") as (namespace, properties):
        address = properties["garden.network.container-ip"]
        assert ipaddress.IPv4Address(address) in subnet(lab)
        assert verdicts(lab, address) == dict.fromkeys(("web-0", "web-1", "api-0", "api-1"), NOBODY)
        rule = lab.rule("web", "api", 8080)
        lab.settle(gateway.add(rule).revision)
        open_ports = [True, False]
        assert verdicts(lab, address) == {
            "web-0": open_ports,
            "web-1": open_ports,
            "api-0": NOBODY,
            "api-1": NOBODY,
        }
        back = connect(namespace, [target(lab.container("web-1").address, 8080)])
        assert back[0].verdict != "accepted"
        lab.settle(gateway.remove(rule).revision)
        rule = lab.rule("api", "web", 8080)
        lab.settle(gateway.add(rule).revision)
        lines = [target(lab.container(name).address, 8080) for name in ("web-0", "web-1", "api-1")]
        assert [each.verdict == "accepted" for each in connect(namespace, lines)] == [True, True, False]
        lab.settle(gateway.remove(rule).revision)
        if attached_by == "silk":
            continue_with_ports(lab, guardian, namespace)


def continue_with_ports(lab, guardian, namespace):
    """A port of the cell leads to the container once Garden asks for it."""
    answer = guardian.call("net-in", "garden-silk", {"HostPort": 0, "ContainerPort": 8080}, namespace)
    assert answer == {"host_port": 61000, "container_port": 8080}
    other = lab.layout.namespace("cell-2")
    underlay = underlay_of(lab, "cell-1")
    assert connect(other, [target(underlay, 61000)])[0].verdict == "accepted"


def underlay_of(lab, cell):
    found = namespaces.run(
        ["ip", "-n", lab.layout.namespace(cell), "-json", "-4", "address", "show", "scope", "global"]
    )
    each = [info["local"] for link in json.loads(found) for info in link["addr_info"]]
    return next(address for address in each if not address.startswith("10.254."))
