"""What the release renders starts the services: each job by its own scripts, under the capabilities that it names."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.certificates import Authority
from bus.nats_config import main as nats_config
from tests.bosh.deployment import CC, CELL_LINKS, GOOD, POLICY_SERVER
from tests.bosh.machine import Machine, eventually, machine
from tests.bosh.release import ADDRESS, RELEASE, Instance, link

CELL = "cf-diego-cell-0"
CELL_JOBS = ("vxlan-policy-agent", "silk-daemon", "garden-cni")
TOKEN = "an-admins-token"  # noqa: S105 (a test's)
CAPABILITIES = {"net_admin": 12, "net_raw": 13, "sys_admin": 21, "sys_ptrace": 19, "dac_override": 1}


def mutual(folder: Path) -> dict[str, str]:
    """ca_cert, server_cert and server_key."""
    authority = Authority(folder, "ca")
    authority.ensure()
    authority.issue(folder / "server.crt", folder / "server.key", names=["IP:127.0.0.1"], usage="serverAuth")
    names = {
        "ca_cert": authority.certificate,
        "server_cert": folder / "server.crt",
        "server_key": folder / "server.key",
    }
    return {name: file.read_text() for name, file in names.items()}


def nats_variables(folder: Path) -> dict[str, Any]:
    """What an operator's two commands make of a list of cells."""
    servers = f"nats-0={ADDRESS}"
    installed = "/var/vcap/jobs/silkbus-nats/config"
    arguments = ["--cells", CELL, "--servers", servers, "--installed", installed, "--out", str(folder)]
    assert nats_config(arguments) == 0
    done = subprocess.run(
        [sys.executable, RELEASE / "nats-vars", folder], capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A cell with the whole of Silkbus on it: NATS with permissions, the centre on SQLite, the three jobs of a cell."""
    folder = tmp_path_factory.mktemp("bosh")
    variables = nats_variables(folder / "nats")
    servers = {"nats.servers": [f"nats://{ADDRESS}:4222"], "nats.ca_cert": variables["silkbus_nats_ca"]}

    def central(name: str) -> dict[str, Any]:
        key = variables[f"silkbus_nats_{name}"]
        return servers | {"nats.client_cert": key["certificate"], "nats.client_key": key["private_key"]}

    with machine(Instance(), network=True) as made:
        made.deploy(
            "silkbus-nats",
            {
                "nats.accounts": variables["silkbus_nats_accounts"],
                "nats.machines": variables["silkbus_nats_machines"],
            },
            {},
        )
        tokens = made.vcap / "tokens.json"
        tokens.write_text(json.dumps({"tokens": [{"token": TOKEN, "user": "ann", "scopes": ["network.admin"]}]}))
        policy_settings = {
            "database": "sqlite:////var/vcap/store/policy-server/policy.db",
            "database_tls": "off",
            "database_ca": None,
            "auth": "tokens",
            "tokens": "/var/vcap/tokens.json",
            "cc_url": "",
            "cc_ca_cert": None,
            "uaa_ca": None,
        }
        made.deploy(
            "policy-server",
            POLICY_SERVER | central("policy_server") | {"settings": policy_settings},
            CC,
        )
        made.deploy(
            "silk-controller",
            GOOD["silk-controller"][0]
            | mutual(folder)
            | central("silk_controller")
            | {
                "settings": {
                    "database": "sqlite:////var/vcap/store/silk-controller/silk.db",
                    "database_tls": "off",
                    "database_ca": None,
                }
            },
            {},
        )
        links = CELL_LINKS | {"cni_config": link("silk-cni", "cni_config", {"dns_servers": ["169.254.0.2"]})}
        for job in CELL_JOBS:
            good = GOOD[job][0] | servers | {"nats.certificates": variables["silkbus_nats_cells"]}
            if job == "silk-daemon":
                good["container_metadata_file_check_timeout"] = 1
            made.deploy(job, good, links)
        made.deploy("silk-cni", *GOOD["silk-cni"])
        made.start("silkbus-nats", "policy-server", "silk-controller")
        made.start(*CELL_JOBS, "silk-cni")
        yield made


def ready(made: Machine, service: str) -> None:
    eventually(f"{service} is ready", lambda: made.get(service, "/readyz")[0] == 200)


def up(made: Machine, handle: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """A container as Garden makes it: a process in a namespace of its own, and the call of the plugin."""
    process = made.spawn("unshare", "--net", "sleep", "infinity")
    own = made.run("readlink", "/proc/self/ns/net").stdout.strip()
    path = f"/proc/{process.pid}/ns/net"
    eventually("the container's namespace exists", lambda: made.run("readlink", path).stdout.strip() != own)
    call = {
        "Pid": process.pid,
        "Properties": {"policy_group_id": "app-1", "app_id": "app-1", "space_id": "s", "org_id": "o", "ports": "8080"},
        "netin": [{"host_port": 0, "container_port": 8080}],
    }
    return process, json.loads(garden(made, "up", handle, json.dumps(call).encode()))


def garden(made: Machine, action: str, handle: str, stdin: bytes = b"null") -> bytes:
    adapter = "--configFile=/var/vcap/jobs/garden-cni/config/adapter.json"
    plugin = "/var/vcap/packages/silkbus/bin/silkbus-garden"
    return made.run(plugin, adapter, "--action", action, "--handle", handle, stdin=stdin).stdout


@pytest.mark.packaging
@pytest.mark.kernel
class TestCell:
    def test_it_becomes_ready(self, cell: Machine) -> None:
        for service in ("enforcer", "silk", "networker"):
            ready(cell, service)
        assert b"10.255." in cell.run("ip", "address", "show", "silk-vtep").stdout

    def test_processes_have_no_more_capabilities_than_they_need(self, cell: Machine) -> None:
        expected = sum(1 << number for number in CAPABILITIES.values())
        for job, more in (("vxlan-policy-agent", 0), ("silk-daemon", 0), ("garden-cni", 1 << 0 | 1 << 3)):
            status = Path(f"/proc/{cell.process(job)}/status").read_text()
            (bounding,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapBnd"))
            assert int(bounding, 16) == expected | more

    def test_a_policy_is_enforced(self, cell: Machine) -> None:
        ready(cell, "enforcer")
        policy = {
            "source": {"id": "app-1"},
            "destination": {"id": "app-2", "protocol": "tcp", "ports": {"start": 8080, "end": 8080}},
        }
        done = cell.run(
            *("curl", "-s", "--noproxy", "*", "-w", "%{http_code}", "-H", f"Authorization: bearer {TOKEN}"),
            *("-d", json.dumps({"policies": [policy]})),
            "http://127.0.0.1:4002/networking/v1/external/policies",
        )
        assert done.stdout == b"{}200", done
        eventually("the policy is enforced", lambda: cell.get("enforcer", "/state")[1]["revision"] >= 1)

    def test_a_container_of_garden_comes_and_goes_while_jobs_are_updated(self, cell: Machine) -> None:
        for service in ("enforcer", "silk", "networker"):
            ready(cell, service)
        process, result = up(cell, "handle-1")
        try:
            address = result["properties"]["garden.network.container-ip"]
            assert result["dns_servers"] == ["169.254.0.2"]
            assert (
                f"s-{''.join(f'{int(part):03}' for part in address.split('.'))}".encode()
                in cell.run("ip", "-o", "link").stdout
            )
            # An update in place: jobs stop and start again around the container. Drain waits for it, then goes on.
            assert cell.script("silk-daemon", "drain") == "0\n"
            assert cell.get("silk", "/")[0] in (200, 404)  # not torn down: containers are still here
            for job in CELL_JOBS:
                cell.monit(job, "stop")
                assert not (cell.vcap / "sys/run/silkbus" / f"{job}.pid").exists()
            cell.start(*CELL_JOBS)
            for service in ("enforcer", "silk", "networker"):
                ready(cell, service)
            (container,) = cell.get("networker", "/containers")[1]["containers"]
            assert container["handle"] == "handle-1"
            inside = cell.run("nsenter", f"--net=/proc/{process.pid}/ns/net", "ip", "-o", "address").stdout
            assert address.encode() in inside
        finally:
            garden(cell, "down", "handle-1")
            process.kill()
            process.wait()
        assert cell.get("networker", "/containers")[1]["containers"] == []

    def test_drain_gives_the_lease_back(self, cell: Machine) -> None:
        ready(cell, "silk")
        leases = (
            "/var/vcap/packages/silkbus/bin/silkbus",
            *("silk", "leases", "--config", "/var/vcap/jobs/silk-controller/config/silk-controller.json", "--json"),
        )
        assert json.loads(cell.run(*leases).stdout)["cell"] == CELL
        assert cell.script("silk-daemon", "drain") == "0\n"
        assert cell.run(*leases).stdout == b""
        assert cell.run("ip", "link", "show", "silk-vtep", check=False).returncode != 0
        cell.monit("silk-daemon", "stop")
        cell.start("silk-daemon")
        ready(cell, "silk")

    def test_the_originals_leftovers_are_taken_away(self, cell: Machine) -> None:
        chain = "vpa--1700000000123456"
        cell.run("iptables", "-N", chain)
        cell.run("iptables", "-I", "FORWARD", "1", "-j", chain)
        cell.run("iptables", "-A", chain, "-j", "ACCEPT")
        kept = "somebodys-own"
        cell.run("iptables", "-N", kept)
        cell.script("vxlan-policy-agent", "pre-start")
        rules = cell.run("iptables", "-S").stdout.decode()
        assert chain not in rules
        assert kept in rules
        assert "sb-" in rules
