"""Other people's CNI plugins, run for Garden as libcni runs them: Debian's, and small ones that say what they got."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.messages import Handle
from tests.networker.cell import eventually
from tests.networker.conftest import namespace
from tests.networker.garden_cell import Garden, garden
from tests.networker.test_garden import NETIN, PROPERTIES, RULES, pid_of

pytestmark = pytest.mark.kernel

SPY = """#!/bin/sh
# Writes down what it is called with, and answers what the file beside it says.
folder=$(dirname "$0")
config=$(cat)
env=$(env | grep ^CNI_ | sort | tr '\\n' ' ')
printf '%s\\n%s\\n' "$(basename "$0") $env" "$config" >> "$folder/calls"
answer="$folder/$(basename "$0").$CNI_COMMAND"
[ -f "$answer" ] && { cat "$answer"; [ ! -f "$answer.fails" ]; exit; }
exit 0
"""
RESULT: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "veth1", "mac": "aa:00:00:00:00:01"}, {"name": "eth0", "sandbox": "/x"}],
    "ips": [{"address": "2001:db8::2/64", "interface": 1}, {"address": "10.255.30.130/24", "interface": 1}],
    "dns": {"nameservers": ["1.1.1.1"]},
}


class Spies:
    """Plugins of the test's own, in a folder beside Debian's."""

    def __init__(self, guardian: Garden) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=guardian.cell.folder))
        guardian.configure(cni_plugin_dir=str(self.folder))

    def add(self, name: str) -> None:
        (self.folder / name).write_text(SPY)
        (self.folder / name).chmod(0o755)

    def answers(self, name: str, command: str, answer: Any, *, fails: bool = False) -> None:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        (self.folder / f"{name}.{command}").write_text(text)
        marker = self.folder / f"{name}.{command}.fails"
        marker.touch() if fails else marker.unlink(missing_ok=True)

    def calls(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Name, command and configuration of each call; then forgotten."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        found = []
        for head, config in zip(lines[::2], lines[1::2], strict=True):
            name, *variables = head.split()
            values = dict(each.partition("=")[::2] for each in variables)
            assert values["CNI_IFNAME"] == "eth0"
            assert values["CNI_PATH"] == str(self.folder)
            found.append((name, values["CNI_COMMAND"], json.loads(config)))
        return found


@pytest.fixture(scope="module")
def shared(netns: str) -> Iterator[Garden]:
    """One networker for all tests: it is left without containers by each."""
    with namespace() as host, garden(netns, f"--net={host}") as guardian:
        guardian.cell.neighbours.others_attach = True
        guardian.cell.start()
        guardian.host = host
        yield guardian


@pytest.fixture
def guardian(shared: Garden) -> Iterator[Garden]:
    with shared.borrowed():
        yield shared


@pytest.fixture
def spies(guardian: Garden) -> Spies:
    return Spies(guardian)


def ipam(guardian: Garden) -> dict[str, Any]:
    ranges = [[{"subnet": "10.255.30.128/25"}]]
    return {"type": "host-local", "dataDir": str(guardian.cell.folder / "ipam"), "ranges": ranges}


@pytest.mark.parametrize("kind", ["ptp", "bridge"])
@pytest.mark.parametrize("version", ["0.4.0", "1.0.0"])
def test_debians_plugins(guardian: Garden, kind: str, version: str) -> None:
    options: dict[str, Any] = {"bridge": {"isGateway": True, "bridge": "sbn0"}, "ptp": {}}[kind]
    tuning = {"type": "tuning", "sysctl": {"net.ipv4.conf.all.log_martians": "1"}}
    guardian.network("theirs", {"type": kind, "ipam": ipam(guardian), **options}, tuning, version=version)
    with namespace() as container:
        answer = guardian.ok("up", body={"Pid": pid_of(container), "Properties": PROPERTIES, "netin": NETIN})
        address = answer["properties"]["garden.network.container-ip"]
        assert address.startswith("10.255.30.1")
        assert answer["properties"]["garden.network.interface"] == "eth0"
        assert address in guardian.run_inside(container, "ip", "address", "show", "dev", "eth0")
        admitted = guardian.cell.neighbours.admitted["h-1"]
        assert (admitted["address"], admitted["app"]) == (address, "app-guid-a")
        assert guardian.cell.neighbours.attached == {}
        if kind == "bridge":
            assert admitted["interface"] == "sbn0"
        else:
            assert admitted["interface"] in guardian.run_inside(guardian.host, "ip", "link")
        assert guardian.ok("up", body={"Pid": pid_of(container)}) == answer
        # The configuration that counts is the one it was attached with.
        guardian.network("theirs", {"type": "host-device"})
        guardian.ok("down")
        assert "eth0" not in guardian.run_inside(container, "ip", "link")
    assert guardian.is_clean()
    assert not list((guardian.cell.folder / "ipam" / "theirs").glob("10.*"))
    assert "/detach" not in guardian.cell.seen("h-1")


def test_what_plugins_are_told(guardian: Garden, spies: Spies) -> None:
    for name in ("first", "second"):
        spies.add(name)
    spies.answers("first", "ADD", RESULT)
    changed = {**RESULT, "dns": {"nameservers": ["9.9.9.9"]}}
    spies.answers("second", "ADD", changed)
    guardian.network("net", {"type": "first", "key": 1}, {"type": "second", "capabilities": {"x": True}})
    answer = guardian.ok(
        "up",
        body={
            "Pid": pid_of(guardian.cell.netns),
            "Properties": PROPERTIES,
            "netout_rules": RULES,
            "netin": [{"host_port": 0, "container_port": 8080}],
        },
    )
    assert answer["properties"]["garden.network.container-ip"] == "10.255.30.130"
    assert answer["dns_servers"] == ["9.9.9.9"]
    runtime = {"portMappings": [{"host_port": 61000, "container_port": 8080}], "netOutRules": RULES}
    common = {"name": "net", "cniVersion": "1.0.0"}
    told = {**common, "metadata": PROPERTIES, "runtimeConfig": runtime}
    assert spies.calls() == [
        ("first", "ADD", {"type": "first", "key": 1, **told}),
        ("second", "ADD", {"type": "second", "capabilities": {"x": True}, **told, "prevResult": RESULT}),
    ]
    guardian.ok("down")
    assert spies.calls() == [
        ("second", "DEL", {"type": "second", "capabilities": {"x": True}, **common, "prevResult": changed}),
        ("first", "DEL", {"type": "first", "key": 1, **common, "prevResult": changed}),
    ]
    guardian.ok("down")  # of what is not there: by the configuration of now, with nothing to tell
    assert spies.calls() == [
        ("second", "DEL", {"type": "second", "capabilities": {"x": True}, **common}),
        ("first", "DEL", {"type": "first", "key": 1, **common}),
    ]


def test_lists_that_are_null(guardian: Garden, spies: Spies) -> None:
    spies.add("first")
    spies.answers("first", "ADD", RESULT)
    guardian.network("net", {"type": "first"})
    guardian.ok("up", body={"Pid": pid_of(guardian.cell.netns)})
    ((_, _, config),) = spies.calls()
    assert config["runtimeConfig"] == {"portMappings": None, "netOutRules": None}
    assert "metadata" not in config


def test_ours_among_others(guardian: Garden, spies: Spies) -> None:
    """First it attaches, and the others get its result; after others it has nothing to attach."""
    spies.add("after")
    guardian.network("net", {"type": "silkbus-cni", "dns_servers": ["169.254.0.2"]}, {"type": "after"})
    spies.answers("after", "ADD", RESULT | {"ips": [{"address": "10.255.30.2/32", "interface": 1}]})
    answer = guardian.ok("up", body={"Pid": pid_of(guardian.cell.netns)})
    ((_, _, config),) = spies.calls()
    assert config["prevResult"]["ips"][0]["address"] == "10.255.30.2/32"
    assert answer["dns_servers"] == ["169.254.0.2"]
    assert guardian.cell.neighbours.attached == {"h-1": "10.255.30.2"}
    guardian.ok("down")
    assert [call[:2] for call in spies.calls()] == [("after", "DEL")]
    assert guardian.is_clean()
    guardian.network("net", {"type": "after"}, {"type": "silkbus-cni"})
    guardian.ok("up", body={"Pid": pid_of(guardian.cell.netns)})
    assert guardian.cell.neighbours.attached == {}
    guardian.ok("down")
    assert guardian.is_clean()


FAILURES: list[tuple[Any, str]] = [
    ({"code": 100, "msg": "banana", "details": "why"}, "banana: why"),
    ({"cniVersion": "1.0.0", "code": 11, "msg": "later"}, "later"),
    ("", "netplugin failed with no error message: exit status 1"),
    ("no json", "netplugin failed but its message is not JSON"),
]


@pytest.mark.parametrize(("answer", "text"), FAILURES)
def test_a_plugin_that_fails(guardian: Garden, spies: Spies, answer: Any, text: str) -> None:
    for name in ("first", "second"):
        spies.add(name)
    spies.answers("first", "ADD", RESULT)
    spies.answers("second", "ADD", answer, fails=True)
    guardian.network("net", {"type": "first"}, {"type": "second"})
    error = guardian.error("up", body={"Pid": pid_of(guardian.cell.netns), "netin": NETIN})
    assert error.startswith(
        f'cni up failed: add network list failed: plugin type="second" name="net" failed (add): {text}'
    )
    assert [call[:2] for call in spies.calls()] == [
        ("first", "ADD"),
        ("second", "ADD"),
        ("second", "DEL"),
        ("first", "DEL"),
    ]
    assert guardian.is_clean()


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({**RESULT, "ips": []}, "expected an IPv4 address in the CNI result"),
        (
            {**RESULT, "ips": [{"address": "10.255.30.3/24", "interface": 2}]},
            "no corresponding interface found, interface index: 2, number of interfaces: 2",
        ),
        ({**RESULT, "ips": [{"address": "10.255.30.3/24", "interface": -1}]}, "no corresponding interface found"),
        ({**RESULT, "ips": [{"address": "banana"}]}, "not an IPv4 address"),
        ("[]", "its answer is not a JSON object"),
        ("", "its answer is not JSON: EOF"),
    ],
)
def test_results_that_are_none(guardian: Garden, spies: Spies, result: Any, text: str) -> None:
    spies.add("first")
    spies.answers("first", "ADD", result)
    guardian.network("net", {"type": "first"})
    assert text in guardian.error("up", body={"Pid": pid_of(guardian.cell.netns)})
    assert guardian.is_clean()


def test_a_plugin_that_is_not_there(guardian: Garden, spies: Spies) -> None:
    guardian.network("net", {"type": "missing"})
    assert guardian.error("up", body={"Pid": pid_of(guardian.cell.netns)}) == (
        'cni up failed: add network list failed: plugin type="missing" name="net" failed (add): '
        f'failed to find plugin "missing" in path [{spies.folder}]'
    )


def test_a_plugin_that_hangs(guardian: Garden, spies: Spies) -> None:
    guardian.cell.kill()
    guardian.cell.start(attach_timeout=3)
    spies.add("first")
    (spies.folder / "first").write_text("#!/bin/sh\n[ $CNI_COMMAND = DEL ] || sleep 1000\n")
    guardian.network("net", {"type": "first"})
    assert "did not attach within 3 s" in guardian.error("up", body={"Pid": pid_of(guardian.cell.netns)})
    assert guardian.is_clean()


def test_a_del_that_fails_is_tried_again(guardian: Garden, spies: Spies) -> None:
    for name in ("first", "second"):
        spies.add(name)
    spies.answers("first", "ADD", RESULT)
    spies.answers("second", "ADD", RESULT)
    spies.answers("second", "DEL", {"code": 100, "msg": "busy"}, fails=True)
    guardian.network("net", {"type": "first"}, {"type": "second"})
    guardian.ok("up", body={"Pid": pid_of(guardian.cell.netns), "netin": NETIN})
    spies.calls()
    assert (
        guardian.error("down") == 'cni down: del network failed: plugin type="second" name="net" failed (delete): busy'
    )
    assert [call[:2] for call in spies.calls()][:2] == [("second", "DEL"), ("first", "DEL")]
    assert "h-1" not in guardian.cell.neighbours.admitted
    spies.answers("second", "DEL", "")
    eventually("the sweep goes on with it", lambda: guardian.cell.records.get(Handle("h-1")) is None)
    guardian.ok("down")
    assert guardian.is_clean()


def test_which_configuration_counts(guardian: Garden, spies: Spies) -> None:
    for name in ("one", "two", "three"):
        spies.add(name)
        spies.answers(name, "ADD", RESULT)
    conf = {"cniVersion": "1.0.0", "name": "single", "type": "one"}
    (guardian.cni / "05-single.conf").write_text(json.dumps(conf))
    (guardian.cni / "ignored.json").write_text("{")
    guardian.ok("up", body={"Pid": pid_of(guardian.cell.netns)})
    guardian.ok("down")
    assert [call[0] for call in spies.calls()] == ["one", "one"]
    for folder, name in (("20-b", "three"), ("20-a", "two")):
        (guardian.cni / folder).mkdir()
        (guardian.cni / folder / "x.conflist").write_text(
            json.dumps({"cniVersion": "1.0.0", "name": "list", "plugins": [{"type": name}]})
        )
    done = guardian.call("up", body={"Pid": pid_of(guardian.cell.netns)})
    assert done.returncode == 0
    said = done.stderr.decode().splitlines()
    assert "Only one CNI config file or conflist (chain) will be executed" in said[0]
    assert len(said) == 3
    assert str(guardian.cni / "20-a" / "x.conflist") in said[1]
    assert [call[0] for call in spies.calls()] == ["two"]


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("a.conflist", "{", "unable to load config from {file}: error parsing configuration list: unexpected EOF"),
        ("a.conflist", "[]", "it is not a JSON object"),
        ("a.conflist", '{"cniVersion": "1.0.0", "plugins": [{"type": "x"}]}', "name: missing"),
        ("a.conflist", '{"cniVersion": "1.0.0", "name": "n"}', "plugins: missing"),
        ("a.conflist", '{"cniVersion": "1.0.0", "name": "n", "plugins": [{}]}', "plugins[0]: type: missing"),
        ("a.conflist", '{"cniVersion": "9", "name": "n", "plugins": [{"type": "x"}]}', "cniVersion: '9'"),
        ("a.conf", '{"cniVersion": "1.0.0", "name": "n"}', "error parsing configuration: "),
        ("a.conf", '{"cniVersion": "1.0.0", "name": "n", "type": "../x"}', "is no name of a plugin"),
    ],
)
def test_configurations_that_are_none(guardian: Garden, file: str, content: str, text: str) -> None:
    (guardian.cni / file).write_text(content)
    error = guardian.error("up", body={"Pid": pid_of(guardian.cell.netns)})
    assert error.startswith("load cni config: unable to load config from ")
    assert text.replace("{file}", str(guardian.cni / file)) in error


def test_no_folder(guardian: Garden) -> None:
    guardian.configure(cni_config_dir="/nonexistent/cni")
    assert guardian.error("up") == (
        "load cni config: error loading config: lstat /nonexistent/cni: no such file or directory"
    )


def test_a_chain_that_a_runtime_runs(guardian: Garden) -> None:
    """Ours after others in a conflist of podman's: it enforces what they attached, and undoes nothing of theirs."""
    cell = guardian.cell
    config: dict[str, Any] = {"chained": True, "app": "a", "prevResult": RESULT}
    assert cell.cni("ADD", config=config) == (0, RESULT)
    assert cell.neighbours.admitted["c1"]["address"] == "10.255.30.130"
    assert cell.neighbours.admitted["c1"]["interface"] == "veth1"
    assert cell.seen("c1") == ["/admit"]
    cell.neighbours.refuse["/"] = (503, "no silk worker here")
    assert cell.cni("STATUS", "", netns="", ifname="", config={"chained": True}) == (0, {})
    assert cell.cni("DEL", config=config) == (0, {})
    assert cell.cni("DEL", config=config) == (0, {})
    assert "/detach" not in cell.seen("c1")
    code, error = cell.cni("ADD", config={"chained": True})
    assert (code, error["code"]) == (1, 7)
    code, error = cell.cni("ADD", config={"prevResult": RESULT})
    assert (code, error["code"]) == (1, 7)
    assert "chained" in error["msg"]
    code, error = cell.cni("ADD", config={"chained": True, "prevResult": {"ips": []}})
    assert (code, error["code"]) == (1, 999)
    assert Path(cell.records.folder).exists()
    assert cell.records.all() == []
