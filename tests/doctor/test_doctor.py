"""The doctor in a network namespace that is wrong in every way it looks at, and what it leaves behind: nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.kernel

PROGRAM = Path(sys.executable).with_name("silkbus")
NAMESPACE = f"doc-{os.getpid()}"
STATE = (
    "ip -br link",
    "ip -br -4 addr",
    "ip -4 route show table all",
    "ip neigh",
    "ipset list",
    "cat /proc/net/ip_tables_names",
    "iptables-nft-save | grep -v '^[#:]'",
)
"""What shows what there is in a namespace. Its names of legacy tables: reading one would make it."""


def inside(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    line = ["ip", "netns", "exec", NAMESPACE, *command]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SILKBUS_")}
    return subprocess.run(line, env={**kept, **environment}, capture_output=True, text=True, timeout=120, check=check)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True, timeout=30)
    try:
        yield {
            "XTABLES_LOCKFILE": str(tmp_path / "lock"),
            "SILKBUS_RUN_DIR": str(tmp_path / "run"),
            "SILKBUS_STATE_DIR": str(tmp_path / "state"),
            "SILKBUS_OVERLAY_NETWORK": "10.253.0.0/16",
        }
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True, timeout=30)


def prepare(*lines: str) -> None:
    for line in lines:
        inside("ip", *line.split())


def examined(environment: dict[str, str]) -> dict[str, list[Any]]:
    done = inside(str(PROGRAM), "doctor", "-o", "json", check=False, **environment)
    assert done.returncode == 1, done.stderr
    found: dict[str, list[Any]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


def test_a_cell_that_is_wrong_in_many_ways(environment: dict[str, str]) -> None:
    prepare(
        "link add eth0 type veth peer name eth1",
        "link set eth0 mtu 1500 up",
        "addr add 10.0.0.1/24 dev eth0",
        "link add silk-vtep type vxlan id 1 local 10.0.0.1 dev eth0 dstport 4790 nolearning",
        "link set silk-vtep mtu 1450 up",
        "link set eth0 mtu 1400",
        "link add s-010253000002 type veth peer name other",
        "link set s-010253000002 mtu 9000 up",
        "link add docker0 type bridge",
        "addr add 10.253.7.1/24 dev docker0",
        "link set docker0 up",
    )
    inside("iptables-nft", "-A", "FORWARD", "-j", "ACCEPT", **environment)
    before = [inside("sh", "-c", command, check=False).stdout for command in STATE]
    found = examined(environment)
    texts = {check: " | ".join(item["what"] for item in items) for check, items in found.items()}
    assert [item["level"] for item in found["kernel"]] == ["ok"]
    assert "no rules of ours" in texts["iptables"]
    assert "GBP is off" in texts["overlay"]
    assert "UDP port 4790, not 4789" in texts["overlay"]
    assert "silk-vtep has MTU 1450" in texts["mtu"]
    assert "larger MTU than the overlay's 1450: s-010253000002" in texts["mtu"]
    assert "the route 10.253.7.0/24 by docker0" in texts["addresses"]
    assert "docker0 has the address 10.253.7.1" in texts["addresses"]
    assert [item["level"] for item in found["services"]] == ["wrong"] * 3
    assert [item["level"] for item in found["bus"]] == ["unknown"]
    assert all(item["remedy"] for items in found.values() for item in items if item["level"] == "wrong")
    assert [inside("sh", "-c", command, check=False).stdout for command in STATE] == before


def test_the_kind_is_the_one_that_the_enforcer_finds(environment: dict[str, str]) -> None:
    """What `iptables` is, unless only the other kind's filter table holds somebody's rules."""
    ask = (
        "from services.doctor.filters import kind_in_use; from services.doctor.settings import DoctorSettings;"
        "from services.enforcer.iptables import detect; print(kind_in_use(DoctorSettings()), detect())"
    )

    def kinds() -> list[str]:
        return inside(sys.executable, "-c", ask, **environment).stdout.split()

    host, enforcers = kinds()
    assert host == enforcers
    other = "legacy" if host == "nft" else "nft"
    inside(f"iptables-{other}", "-A", "FORWARD", "-j", "ACCEPT", **environment)
    assert kinds() == [other, other]
    inside(f"iptables-{host}", "-A", "FORWARD", "-j", "ACCEPT", **environment)
    assert kinds() == [host, host]


def test_no_overlay_at_all(environment: dict[str, str]) -> None:
    found = examined(environment)
    assert found["overlay"][0]["what"] == "there is no device silk-vtep"
    assert found["offload"][0]["level"] == "unknown"


def test_a_bus_that_is_not_there(environment: dict[str, str]) -> None:
    found = examined({**environment, "SILKBUS_CELL": "cell-1", "SILKBUS_NATS": "nats://127.0.0.1:9"})
    assert "no connection to NATS at nats://127.0.0.1:9" in found["bus"][0]["what"]


def test_wrong_usage(environment: dict[str, str]) -> None:
    for arguments, problem in (
        (("--through", "x"), "--through and --to must be given together"),
        (("--through", "x", "--to", "10.0.0.1"), "--to: must be ADDRESS:PORT"),
        (("--config", "/nothing"), "/nothing: cannot be read"),
    ):
        done = inside(str(PROGRAM), "doctor", *arguments, check=False, **environment)
        assert done.returncode == 2
        assert problem in done.stderr


def test_evidence_for_support(environment: dict[str, str]) -> None:
    done = inside(str(PROGRAM), "doctor", "-o", "json", "--evidence", check=False, **environment)
    evidence = json.loads(done.stdout)["evidence"]
    assert " lo: " in evidence["links.txt"]
    assert {"iptables-nft.txt", "iptables-legacy.txt", "conntrack.txt", "ipset.txt"} <= evidence.keys()
    assert inside("cat", "/proc/net/ip_tables_names", check=False).stdout == ""
