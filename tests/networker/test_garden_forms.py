"""What the Garden door reads and refuses, without a cell: flags, configuration, inputs, in Go's manner."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.decode import Malformed
from bus.messages import Handle, PortForward, Protocol
from services.networker import garden, port_state
from services.networker.errors import Conflict, Failed
from services.networker.garden import GardenError
from services.networker.go_json import Struct, first_value, go_output, whole_value
from services.networker.ports import Mapping, PortPool, Range
from tests.networker.test_cni import JSON

CONFIG: dict[str, Any] = {
    "cni_plugin_dir": "/p",
    "cni_config_dir": "/c",
    "bind_mount_dir": "/b",
    "state_file": "/s",
    "start_port": 61000,
    "total_ports": 5000,
    "log_prefix": "prefix",
    "iptables_lock_file": "/l",
    "proxy_port": 15001,
    "proxy_uid": 0,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.json"
    path.write_text(json.dumps(CONFIG))
    return path


def refusal(*arguments: str) -> str:
    with pytest.raises(GardenError) as caught:
        garden.parse(arguments, "/")
    return caught.value.output()


@pytest.mark.parametrize(
    "flags",
    [
        ["-action", "up", "-handle", "h"],
        ["--action", "up", "--handle", "h"],
        ["-action=up", "--handle=h"],
        ["--action=down", "--action=up", "-handle", "h", "--"],
    ],
)
def test_every_form_of_a_flag(file: Path, flags: list[str]) -> None:
    command = garden.parse([f"--configFile={file}", *flags], "/")
    assert (command.action, command.handle, command.netns) == ("up", "h", "/b/h")
    assert command.config.ports == Range(61000, 5000)


def test_a_relative_path_is_the_callers(file: Path) -> None:
    command = garden.parse(["-configFile", file.name, "-action", "up", "-handle", "h"], str(file.parent))
    assert command.config.prefix == "prefix"


def test_flags_come_first() -> None:
    assert refusal("-banana") == (
        "flag provided but not defined: -banana\nUsage of silkbus-garden:\n  -action string\n  -configFile string\n"
        "  -handle string\ncfnetworking: parse args: flag provided but not defined: -banana\n"
    )
    assert refusal("--action").endswith("cfnetworking: parse args: flag needs an argument: -action\n")
    assert refusal("---action=up").endswith("cfnetworking: parse args: bad flag syntax: ---action=up\n")
    assert refusal("-=up").endswith("cfnetworking: parse args: bad flag syntax: -=up\n")
    assert refusal("-help").endswith("cfnetworking: parse args: flag: help requested\n")


def test_the_order_of_checks(file: Path) -> None:
    assert refusal("x") == "cfnetworking: parse args: missing required flag 'configFile'\n"
    assert refusal("--configFile=/nope", "x") == (
        "cfnetworking: parse args: file does not exist: stat /nope: no such file or directory\n"
    )
    given_file = f"--configFile={file}"
    assert refusal(given_file, "a", "b") == "prefix: parse args: unexpected extra args: [a b]\n"
    assert refusal(given_file) == "prefix: parse args: missing required flag 'handle'\n"
    assert refusal(given_file, "--handle=h") == "prefix: parse args: missing required flag 'action'\n"
    assert refusal(f"--configFile={file.parent}").startswith("cfnetworking: parse args: reading config file: read ")


@pytest.mark.parametrize("key", list(CONFIG))
def test_every_key_is_required(file: Path, key: str) -> None:
    """The first that is missing, in this order; those after it may be missing, too."""
    keys = list(CONFIG)
    file.write_text(json.dumps({each: CONFIG[each] for each in keys[: keys.index(key)]}))
    prefix = "prefix" if keys.index(key) > keys.index("log_prefix") else "cfnetworking"
    assert refusal(f"--configFile={file}") == f"{prefix}: parse args: missing required config '{key}'\n"
    file.write_text(json.dumps({each.upper(): value for each, value in CONFIG.items()}))
    assert refusal(f"--configFile={file}") == "prefix: parse args: missing required flag 'handle'\n"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "unexpected end of JSON input"),
        ("{", "unexpected EOF"),
        ("[]", "json: cannot unmarshal array into Go value of type config.Config"),
        ("{} x", "invalid character 'x' after top-level value"),
        ('{"start_port": "61000"}', "json: cannot unmarshal string into Go struct field Config.start_port of type int"),
        (json.dumps(CONFIG | {"start_port": 70000}), "there are no 5000 ports from 70000 on"),
        (json.dumps(CONFIG | {"total_ports": -5}), "there are no -5 ports"),
        (json.dumps(CONFIG | {"proxy_port": 70000}), "proxy_port: 70000 is not within 1-65535"),
        (json.dumps(CONFIG | {"bind_mount_dir": "x"}), "bind_mount_dir: must be an absolute path"),
        (json.dumps(CONFIG | {"search_domains": [7]}), "search_domains"),
    ],
)
def test_configurations_that_are_none(file: Path, content: str, text: str) -> None:
    file.write_text(content)
    told = refusal(f"--configFile={file}")
    assert told.startswith(f"cfnetworking: parse args: parsing config ({file}): ")
    assert text in told


ARGUMENTS = st.lists(
    st.sampled_from(["--action", "-handle", "--configFile=/nope", "--", "-", "=", "--=", "x", "-action=up"]) | st.text()
)


@given(ARGUMENTS)
def test_any_arguments_are_read_or_refused(arguments: list[str]) -> None:
    with pytest.raises(GardenError):
        garden.parse(arguments, "/")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(list(CONFIG)), JSON).map(lambda more: json.dumps(CONFIG | more).encode())
)
def test_any_configuration_is_read_or_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    said = ""
    try:
        garden.parse([f"--configFile={file}", "--action=up", "--handle=h"], "/")
    except GardenError as error:
        said = error.output()
    assert said.count("\n") == bool(said)


INPUTS = st.dictionaries(
    st.sampled_from(["Pid", "pid", "PROPERTIES", "netin", "netout_rules", "netout_rule", "HostPort", "containerport"]),
    JSON,
).map(json.dumps)


@given(text=st.text() | INPUTS)
def test_any_input_is_read_or_refused(text: str) -> None:
    for read in (
        garden.up_inputs,
        garden.net_in_input,
        lambda text: garden.net_out_inputs(text, "net-out"),
        lambda text: garden.net_out_inputs(text, "bulk-net-out"),
    ):
        with suppress(Malformed):
            read(text)


def test_json_as_go_reads_it() -> None:
    assert first_value(' {"a": 1} {"b"') == {"a": 1}
    assert first_value('"\\ud800x"') == "\ufffdx"
    struct = Struct({"PID": 1, "pid": 2, "other": None}, "UpInputs")
    assert struct.get("Pid", "int", 0) == 2
    assert struct.get("other", "string", "") == ""
    for text in ("NaN", "-Infinity", '{"a": NaN}'):
        with pytest.raises(Malformed, match="looking for beginning of value"):
            first_value(text)
    with pytest.raises(Malformed, match="after top-level value"):
        whole_value("{} {}")
    with pytest.raises(Malformed, match="number 9223372036854775808"):
        Struct({"Pid": 2**63}, "UpInputs").get("Pid", "int", 0)
    with pytest.raises(Malformed, match="cannot unmarshal bool"):
        Struct({"Pid": True}, "UpInputs").get("Pid", "int", 0)


def test_json_as_go_writes_it() -> None:
    assert go_output({"a": "<&>\u2028ä"}) == '{"a":"\\u003c\\u0026\\u003e\\u2028ä"}\n'


class TestPorts:
    def test_the_lowest_free_one(self) -> None:
        pool = PortPool()
        chosen = pool.choose(Handle("a"), [Mapping(0, 1), Mapping(61001, 2), Mapping(0, 3)], Range(61000, 5))
        assert [forward.host_port for forward in chosen] == [61000, 61001, 61002]
        assert [each.host_port for each in pool.choose(Handle("b"), [Mapping(0, 1)], Range(61000, 5), {61003})] == [
            61004
        ]
        with pytest.raises(Failed, match="port pool exhausted"):
            pool.choose(Handle("c"), [Mapping(0, 1)], Range(61000, 5), {61003})
        pool.keep(Handle("a"), ())
        assert pool.choose(Handle("c"), [Mapping(0, 1)], Range(61000, 5))[0].host_port == 61000

    def test_the_range_ends_with_the_last_port(self) -> None:
        pool = PortPool()
        chosen = pool.choose(Handle("a"), [Mapping(0, 1)] * 4, Range(65532, 5000))
        assert chosen[-1].host_port == 65535
        with pytest.raises(Failed, match="all 4 ports of 65532-65535"):
            pool.choose(Handle("b"), [Mapping(0, 1)], Range(65532, 5000))

    def test_one_port_is_one_containers(self) -> None:
        pool = PortPool()
        pool.take(Handle("a"), [PortForward(80, 1)])
        pool.take(Handle("a"), [PortForward(80, 1), PortForward(80, 1, Protocol.UDP)])
        for forward in (PortForward(80, 2), PortForward(80, 1, Protocol.UDP)):
            with pytest.raises(Conflict, match="forwarded to container a"):
                pool.take(Handle("b"), [forward])
        with pytest.raises(Conflict, match="forwarded to container a"):
            pool.take(Handle("a"), [PortForward(80, 2)])
        with pytest.raises(Conflict, match="forwarded to container c"):
            pool.take(Handle("c"), [PortForward(90, 1), PortForward(90, 2)])

    @given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 6), st.booleans()), max_size=40))
    def test_no_port_is_ever_two_containers(self, steps: list[tuple[str, int, bool]]) -> None:
        pool = PortPool()
        kept: dict[str, tuple[PortForward, ...]] = {}
        for handle, port, gone in steps:
            if gone:
                pool.keep(Handle(handle), ())
                kept.pop(handle, None)
                continue
            try:
                chosen = pool.choose(Handle(handle), [Mapping(port, 7)], Range(1, 6))
            except (Conflict, Failed):
                continue
            kept[handle] = tuple(dict.fromkeys((*kept.get(handle, ()), *chosen)))
            ports = [forward.host_port for forwards in kept.values() for forward in forwards]
            assert len(ports) == len(set(ports))


def test_the_state_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.json"
    assert port_state.acquired(str(path)) == {}
    port_state.keep(str(path), "a", [61001, 61000])
    assert json.loads(path.read_text()) == {"acquired_ports": {"a": [61000, 61001]}}
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    port_state.keep(str(path), "b", [5])
    port_state.keep(str(path), "a", [])
    assert json.loads(path.read_text()) == {"acquired_ports": {"b": [5]}}
    path.write_text("junk")
    assert port_state.acquired(str(path)) == {}
    port_state.keep(str(path), "c", [6])
    assert json.loads(path.read_text()) == {"acquired_ports": {"c": [6]}}
