"""From the original to ours by BOSH: its databases are taken over by the release's own scripts; then old and new cells
live side by side, as far as our side of the wire goes."""

import asyncio
import json
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from bus import subjects
from bus.certificates import Authority
from bus.connection import connect
from bus.database import open_database
from bus.messages import Lease, cell_name
from tests.bosh.machine import PATIENCE, machine
from tests.bosh.release import Instance, link
from tests.databases import Server
from tests.nats_server import NatsServer, free_port
from tests.policy.original_database import OriginalDatabase

pytestmark = [pytest.mark.packaging, pytest.mark.kernel]

OLD_CELL = "10.0.0.5"
OLD_LEASE = {
    "underlay_ip": OLD_CELL,
    "overlay_subnet": "10.255.17.0/24",
    "overlay_hardware_addr": "ee:ee:0a:ff:11:00",
}
SUBNETS = """
CREATE TABLE subnets (id SERIAL PRIMARY KEY, underlay_ip varchar(15) NOT NULL, overlay_subnet varchar(18) NOT NULL,
    overlay_hwaddr varchar(17) NOT NULL, last_renewed_at bigint NOT NULL,
    UNIQUE (underlay_ip), UNIQUE (overlay_subnet), UNIQUE (overlay_hwaddr))
"""


async def originals(policies: str, leases: str) -> None:
    """The original's databases, with a policy and a lease."""
    async with open_database(policies) as database:
        original = OriginalDatabase(database)
        await original.create()
        await original.give("app-a", 7)
        await original.give("app-b", 42)
        await original.allow([("app-a", "app-b", "tcp", 8080, 8090)])
    async with open_database(leases) as database:
        await database.execute(SUBNETS)
        await database.execute("CREATE TABLE gorp_migrations (id varchar(255) PRIMARY KEY, applied_at timestamp)")
        await database.execute(
            "INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at)"
            " VALUES (:ip, :subnet, :mac, :at)",
            {
                "ip": OLD_CELL,
                "subnet": OLD_LEASE["overlay_subnet"],
                "mac": OLD_LEASE["overlay_hardware_addr"],
                "at": int(time.time()) - 60,
            },
        )


class Authorities:
    """One authority for the servers' certificates and the old cells'."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder, "ca")
        self.authority.ensure()
        self.files = {}
        for name, usage in (("server", "serverAuth"), ("client", "clientAuth")):
            self.files[name] = folder / f"{name}.crt", folder / f"{name}.key"
            self.authority.issue(*self.files[name], names=["IP:127.0.0.1"], usage=usage)

    @property
    def properties(self) -> dict[str, str]:
        certificate, key = self.files["server"]
        return {
            "ca_cert": self.authority.certificate.read_text(),
            "server_cert": certificate.read_text(),
            "server_key": key.read_text(),
        }

    def client(self, port: int) -> httpx.Client:
        """What an old cell's process asks with."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(*self.files["client"])
        return httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, timeout=PATIENCE, trust_env=False)


async def test_old_and_new_cells_side_by_side(postgresql: Server, nats_server: NatsServer, tmp_path: Path) -> None:
    postgresql.sql("CREATE DATABASE old_policies", "CREATE DATABASE old_leases")
    await originals(postgresql.url("old_policies"), postgresql.url("old_leases"))
    await asyncio.to_thread(_migrate, postgresql, nats_server, tmp_path)


def _migrate(postgresql: Server, nats_server: NatsServer, folder: Path) -> None:
    certificates = Authorities(folder)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps({"tokens": [{"token": "t", "user": "ann", "scopes": ["network.admin"]}]}))
    common: dict[str, Any] = {
        "database.type": "postgres",
        "database.username": "silkbus",
        "database.password": "any",
        "database.host": "127.0.0.1",
        "database.port": postgresql.port,
        "nats.servers": [nats_server.url],
        "listen_ip": "127.0.0.1",
    }
    policy = common | {
        "database.name": "old_policies",
        "import_from_original": True,
        "uaa_client_secret": "s",
        "cc_hostname": "127.0.0.1",
        "cc_port": 9,
        "listen_port": free_port(),
        "debug_port": free_port(),
        "settings": {"auth": "tokens", "tokens": str(tokens), "cc_url": ""},
    }
    internal = certificates.properties | {
        "nats.servers": [nats_server.url],
        "listen_ip": "127.0.0.1",
        "internal_listen_port": free_port(),
        "health_check_port": free_port(),
        "debug_port": free_port(),
    }
    controller = (
        common
        | certificates.properties
        | {
            "database.name": "old_leases",
            "listen_port": free_port(),
            "health_check_port": free_port(),
            "debug_port": free_port(),
        }
    )
    dbconn = {
        "dbconn": link("policy-server", "dbconn", policy),
        "tag_length": link("policy-server", "tag_length", policy),
    }
    with machine(Instance("api"), network=False) as made:
        made.deploy("policy-server", policy, {})
        made.deploy("policy-server-internal", internal, dbconn)
        made.deploy("silk-controller", controller, {})
        made.start("policy-server", "policy-server-internal", "silk-controller")

        # An old cell's agent: the policy is there, with the tags that packets on the wire have.
        with certificates.client(internal["internal_listen_port"]) as agent:
            (found,) = agent.get("/networking/v1/internal/policies").json()["policies"]
            assert found["source"] == {"id": "app-a", "tag": "0007"}
            assert found["destination"]["tag"] == "002A"
            assert found["destination"]["ports"] == {"start": 8080, "end": 8090}
            updated = int(agent.get("/networking/v1/internal/policies_last_updated").text)
            assert updated > (time.time() - PATIENCE * 10) * 1e9  # later than what it had from the original

            # A change through our API gives a tag that nobody has, and the old agent sees it.
            change = {"source": {"id": "app-c"}, "destination": {"id": "app-b", "protocol": "udp"}}
            change["destination"]["ports"] = {"start": 53, "end": 53}  # type: ignore[assignment]
            answer = httpx.post(
                f"http://127.0.0.1:{policy['listen_port']}/networking/v1/external/policies",
                headers={"Authorization": "bearer t"},
                json={"policies": [change]},
                timeout=PATIENCE,
                trust_env=False,
            )
            assert answer.status_code == 200, answer.text
            deadline = time.monotonic() + PATIENCE
            while len(seen := agent.get("/networking/v1/internal/policies").json()["policies"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            tags = {side["id"]: side["tag"] for each in seen for side in (each["source"], each["destination"])}
            assert tags["app-a"] == "0007"
            assert tags["app-b"] == "002A"
            assert tags["app-c"] not in ("0007", "002A")
            assert int(agent.get("/networking/v1/internal/policies_last_updated").text) > updated

        with certificates.client(controller["listen_port"]) as daemon:
            # An old cell's daemon keeps its lease; another old one, and a new cell, get others of the same pool.
            assert daemon.put("/leases/renew", json=OLD_LEASE).status_code == 200
            second = daemon.put("/leases/acquire", json={"underlay_ip": "10.0.0.6", "single_overlay_ip": False}).json()
            new = _acquire(nats_server.url, "cf-diego-cell-0", "10.0.0.7")
            moved = _acquire(nats_server.url, "cf-diego-cell-1", OLD_CELL)
            listed = {each["underlay_ip"]: each["overlay_subnet"] for each in daemon.get("/leases").json()["leases"]}
            assert listed == {
                OLD_CELL: OLD_LEASE["overlay_subnet"],
                "10.0.0.6": second["overlay_subnet"],
                "10.0.0.7": str(new.subnet),
            }
            assert len(set(listed.values())) == 3
            # The old cell was recreated as a new one, at its address: the subnet goes with it.
            assert str(moved.subnet) == OLD_LEASE["overlay_subnet"]

        # The next deployment, with the same property: what was changed since is not undone, and nothing fails.
        again = made.run("/var/vcap/jobs/policy-server/bin/pre-start")
        assert b"has already been changed through the API" in again.stderr

        for job in ("policy-server-internal", "silk-controller"):
            made.script(job, "dns/healthy")
        for job in ("policy-server", "policy-server-internal", "silk-controller"):
            made.monit(job, "stop")
        # As after a restoring: by the script that BBR calls, but for monit, which is not here.
        script = (made.vcap / "jobs/policy-server/bin/bbr/post-restore-unlock").read_text()
        lines = [line for line in script.splitlines() if "monit" not in line]
        assert b"tags can be given to new apps" in made.run("bash", "-c", "\n".join(lines)).stdout

        # By UAA, as properties alone have it: it is not there, which is neither the token's fault nor an end.
        made.deploy("policy-server", policy | {"uaa_hostname": "127.0.0.1", "uaa_port": 9, "settings": {}}, {})
        made.start("policy-server")
        asked = httpx.get(
            f"http://127.0.0.1:{policy['listen_port']}/networking/v1/external/policies",
            headers={"Authorization": "bearer t"},
            timeout=PATIENCE,
            trust_env=False,
        )
        assert asked.status_code == 503


def _acquire(nats: str, cell: str, underlay: str) -> Lease:
    """What a new cell's worker asks on the bus."""

    async def ask() -> Lease:
        async with connect(nats, role="cell", name=cell_name(cell)) as connection:
            assert await connection.wait_connected(PATIENCE)
            answer = await connection.request(subjects.lease(cell, "acquire"), {"underlay": underlay}, timeout=PATIENCE)
            assert "lease" in answer, answer
            return Lease.decode(answer.mapping("lease"), "answer")

    return asyncio.run(ask())
