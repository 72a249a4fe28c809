"""`silkbus-silk`: the silk worker as a CNI plugin of its own, called as a runtime calls it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from services.networker import install
from tests.silk.conftest import eventually, reaches, sh
from tests.silk.processes import Start, Worker

pytestmark = pytest.mark.kernel

CONFIG: dict[str, Any] = {"cniVersion": "1.0.0", "name": "silk", "type": "silkbus-silk"}


class Plugin:
    """The plugin, installed for one worker, called with the environment and configuration of a runtime."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        assert install.main([str(folder), "--silk", "--run-dir", str(worker.cell.settings.run_dir)]) == 0
        self._file = folder / "silkbus-silk"

    def call(self, command: str, handle: str = "", netns: str = "", args: str = "", **config: Any) -> tuple[int, Any]:
        environment = {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin", "CNI_ARGS": args}
        if handle:
            environment |= {"CNI_CONTAINERID": handle, "CNI_IFNAME": "eth0"}
        if netns:
            environment["CNI_NETNS"] = netns
        done = subprocess.run(
            [self._file],
            input=json.dumps(CONFIG | config).encode(),
            env={**os.environ, **environment},
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else None


async def test_a_runtime_attaches_checks_and_detaches(start: Start, tmp_path: Path) -> None:
    _, (worker,) = start()
    await worker.ready()
    plugin = Plugin(worker, tmp_path / "bin")
    assert plugin.call("VERSION")[1]["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert plugin.call("STATUS", cniVersion="1.1.0") == (0, None)
    netns = worker.cell.container()
    code, result = plugin.call("ADD", "web-1", netns)
    # As the original's silk-cni answers (contract/cell.md 3.2).
    assert (code, result) == (
        0,
        {
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": "s-010255001002", "mac": "aa:aa:0a:ff:01:02"},
                {"name": "eth0", "mac": "ee:ee:0a:ff:01:02", "sandbox": netns},
            ],
            "ips": [{"interface": 1, "address": "10.255.1.2/32", "gateway": "169.254.0.1"}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.0.1"}],
            "dns": {},
        },
    )
    assert reaches(worker.cell.name, "10.255.1.2")
    assert plugin.call("ADD", "web-1", netns) == (0, result)
    assert plugin.call("CHECK", "web-1", netns, prevResult=result) == (0, None)
    other = json.loads(json.dumps(result).replace("10.255.1.2/32", "10.255.1.9/32"))
    assert plugin.call("CHECK", "web-1", netns, prevResult=other)[1]["code"] == 3
    sh("ip", "-n", netns.rpartition("/")[2], "addr", "flush", "dev", "eth0")
    code, error = plugin.call("CHECK", "web-1", netns, prevResult=result)
    assert (code, error["code"]) == (1, 3)
    assert "not wholly" in error["msg"]
    assert plugin.call("DEL", "web-1", netns) == (0, None)
    assert plugin.call("DEL", "web-1", netns) == (0, None)
    assert not reaches(worker.cell.name, "10.255.1.2", timeout=1)


async def test_capabilities_and_garbage_collection(start: Start, tmp_path: Path) -> None:
    _, (worker,) = start()
    await worker.ready()
    plugin = Plugin(worker, tmp_path / "bin")
    limits = {"ingressRate": 10**6, "ingressBurst": 10**6, "egressRate": 10**6, "egressBurst": 10**6}
    wishes = {"ips": ["10.255.1.50/32"], "mac": "02:00:00:00:00:50", "bandwidth": limits}
    one, two = worker.cell.container(), worker.cell.container()
    assert plugin.call("ADD", "web-1", one, runtimeConfig=wishes)[1]["ips"][0]["address"] == "10.255.1.50/32"
    assert "tbf 1: root" in worker.cell.sh("tc", "qdisc", "show", "dev", "s-010255001050")
    code, error = plugin.call("ADD", "web-2", two, args="IgnoreUnknown=1;IP=10.255.1.50")
    assert (code, error["code"], "in use by web-1" in error["msg"]) == (1, 4, True)
    code, error = plugin.call("ADD", "web-2", two, runtimeConfig={"bandwidth": {"ingressRate": 5000}})
    assert (code, error["code"], "burst must also be set" in error["msg"]) == (1, 7, True)
    assert plugin.call("ADD", "web-2", two)[0] == 0
    await worker.attach("elsewhere", worker.cell.container())
    valid = [{"containerID": "web-2", "ifname": "eth0"}]
    gc = {"cniVersion": "1.1.0", "cni.dev/valid-attachments": valid}
    assert plugin.call("GC", **gc | {"name": "another"}) == (0, None)
    assert plugin.call("GC", **gc) == (0, None)
    links = [each for each in json.loads(worker.cell.sh("ip", "-j", "link")) if each["ifname"].startswith("s-")]
    assert sorted(each["ifalias"] for each in links) == ["elsewhere", "web-2"]
    assert "bwp" not in worker.cell.sh("ip", "link")


async def test_what_is_wrong_is_said(start: Start, tmp_path: Path) -> None:
    _, (worker,) = start(centre_up=False)
    await worker.until(lambda answer: "no lease yet" in answer)
    plugin = Plugin(worker, tmp_path / "bin")
    netns = worker.cell.container()
    code, error = plugin.call("ADD", "web-1", netns)
    assert (code, error["code"], "no lease yet" in error["msg"]) == (1, 11, True)
    assert plugin.call("STATUS", cniVersion="1.1.0")[1]["code"] == 50
    assert plugin.call("ADD", "web-1", netns, cniVersion="9.9.9")[1]["code"] == 1
    assert plugin.call("ADD", "web-1")[1]["code"] == 4
    worker.process.stop()
    eventually(lambda: plugin.call("ADD", "web-1", netns)[1]["code"] == 11)
    assert "start silkbus-silk-worker" in plugin.call("ADD", "web-1", netns)[1]["msg"]
