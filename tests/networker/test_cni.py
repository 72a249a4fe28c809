"""What is read from a CNI call and how it is answered, without a cell."""

import json
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.decode import Fields, Malformed
from bus.messages import AppId, Container, Handle, Stage
from services.networker import cni
from services.networker.cni import CniError
from services.networker.identity import Identity, identity_of
from services.networker.record import Attachment, Link

CONFIG = {"cniVersion": "1.0.0", "name": "overlay", "type": "silkbus-cni"}
CALL: dict[str, Any] = {
    "command": "ADD",
    "container_id": "c1",
    "netns": "/run/netns/c1",
    "ifname": "eth0",
    "args": "IgnoreUnknown=1;SILKBUS_APP=web",
    "path": "/opt/cni/bin",
    "config": json.dumps(CONFIG),
}
LINK = Link(
    IPv4Address("10.255.30.2"), "s-1", "aa:aa:00:00:00:01", "ee:ee:00:00:00:01", 1450, IPv4Address("169.254.0.1")
)


def parse(**changes: Any) -> cni.Request:
    return cni.parse(Fields({name: value for name, value in (CALL | changes).items() if value != ""}, "call"))


def refusal(**changes: Any) -> CniError:
    with pytest.raises(CniError) as caught:
        parse(**changes).attachment()
    return caught.value


def config(**changes: Any) -> str:
    return json.dumps({name: value for name, value in (CONFIG | changes).items() if value is not None})


def test_a_call() -> None:
    attachment = parse(config=config(metadata={"org_id": "o"})).attachment()
    identity = Identity(AppId("web"), metadata={"policy_group_id": "web", "org_id": "o"})
    assert attachment == Attachment(Handle("c1"), "/run/netns/c1", "eth0", "overlay", identity)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"command": "PAINT"}, 4, "unknown CNI_COMMAND: PAINT"),
        ({"command": ""}, 4, "command: missing"),
        (
            {"container_id": "", "netns": "", "ifname": "", "path": ""},
            4,
            "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing",
        ),
        ({"netns": ""}, 4, "required env variables [CNI_NETNS] missing"),
        ({"command": "DEL", "netns": "", "ifname": ""}, 4, "required env variables [CNI_IFNAME] missing"),
        ({"container_id": "../c1"}, 4, "invalid characters in containerID"),
        ({"container_id": "c" * 300}, 4, "containerID is too long"),
        ({"ifname": "e" * 16}, 4, "interface name is too long"),
        ({"ifname": ".."}, 4, "interface name is . or .."),
        ({"ifname": "eth 0"}, 4, "whitespace"),
        ({"args": "SILKBUS_APP"}, 4, "invalid pair"),
        ({"args": "SILKBUS_APP="}, 7, "SILKBUS_APP: must not be empty"),
        ({"netns": "/run/\udcff"}, 4, "environment"),
        ({"config": ""}, 6, "error unmarshall network config"),
        ({"config": "{"}, 6, "error unmarshall network config"),
        ({"config": "[]"}, 6, "not a JSON object"),
        ({"config": "[" * 100_000}, 6, "error unmarshall network config"),
        ({"config": '{"x": NaN}'}, 6, "error unmarshall network config"),
        ({"config": '{"x": 1e999}'}, 6, "error unmarshall network config"),
        ({"config": '{"x": "\\ud800"}'}, 6, "error unmarshall network config"),
        ({"config": config(cniVersion="0.2.0")}, 1, "incompatible CNI versions"),
        ({"config": config(cniVersion=None)}, 1, "incompatible CNI versions"),
        ({"config": config(cniVersion=[])}, 1, "incompatible CNI versions"),
        ({"config": config(name=None)}, 7, "missing network name"),
        ({"config": config(name="a/b")}, 7, "invalid characters found in network name"),
        ({"config": config(dns=[])}, 7, "dns"),
        ({"config": config(metadata="x")}, 7, "metadata"),
        ({"config": config(metadata={"policy_group_id": 7})}, 7, "policy_group_id"),
        ({"config": config(metadata={"policy_group_id": "x" * 256})}, 7, "policy_group_id"),
        ({"config": config(app=["x"]), "args": ""}, 7, "app: must be text"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], code: int, text: str) -> None:
    error = refusal(**changes)
    assert error.code == code
    assert text in str(error)
    told = json.loads(error.output())
    assert told["code"] == code
    assert text in told["msg"]
    assert told["cniVersion"] in cni.VERSIONS


def test_version_error_says_what_is_supported() -> None:
    error = refusal(config=config(cniVersion="0.2.0"))
    assert error.details == 'config is "0.2.0", plugin supports [0.3.1, 0.4.0, 1.0.0, 1.1.0]'


@pytest.mark.parametrize("value", [None, 7, {"a": 1}, [7], [{}], [{"containerID": [], "ifname": "x"}]])
def test_gc_needs_a_list(value: object) -> None:
    request = parse(
        command="GC", container_id="", netns="", ifname="", config=config(**{"cni.dev/valid-attachments": value})
    )
    with pytest.raises(CniError, match="valid-attachments"):
        request.valid_attachments()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["cniVersion", "name", "dns", "metadata", "app", "apps", "prevResult", "runtimeConfig", "policy_group_id"]


@given(text=st.text() | JSON.map(json.dumps) | st.dictionaries(st.sampled_from(NAMES), JSON).map(lambda d: config(**d)))
def test_any_configuration_is_read_or_refused_in_cnis_terms(text: str) -> None:
    """And what was read can be kept in a record and read back."""
    try:
        attachment = parse(config=text).attachment()
    except CniError as error:
        json.loads(error.output())
        return
    record = attachment.record(Stage.ATTACHING)
    assert Attachment.of(Container.decode(json.loads(json.dumps(record.encode())))) == attachment


@given(call=st.dictionaries(st.sampled_from(list(CALL)), JSON))
def test_any_call_is_read_or_refused(call: Mapping[str, Any]) -> None:
    try:
        cni.parse(Fields(CALL | call, "call"))
    except CniError as error:
        json.loads(error.output())


def test_a_record_keeps_the_whole_attachment() -> None:
    attachment = Attachment(Handle("c1"), "/run/netns/c1", "eth0", "overlay", Identity(metadata={"a": [1]}), link=LINK)
    assert Attachment.of(attachment.record(Stage.READY)) == attachment


@pytest.mark.parametrize("version", cni.VERSIONS)
def test_result_forms(version: str) -> None:
    attachment = Attachment(Handle("c1"), "/run/netns/c1", "eth0", "overlay", link=LINK)
    result = json.loads(cni.result(attachment, version, {"nameservers": ["1.1.1.1"]}))
    assert result["cniVersion"] == version
    assert [interface["name"] for interface in result["interfaces"]] == ["s-1", "eth0"]
    (address,) = result["ips"]
    assert result["interfaces"][address["interface"]]["sandbox"] == "/run/netns/c1"
    assert address.get("version") == ("4" if version < "1.0.0" else None)
    assert result["interfaces"][0].get("mtu") == (1450 if version == "1.1.0" else None)
    assert result["routes"] == [{"dst": "0.0.0.0/0", "gw": "169.254.0.1"}]
    assert result["dns"] == {"nameservers": ["1.1.1.1"]}


@pytest.mark.parametrize(
    ("config", "arguments", "app"),
    [
        ({}, {}, None),
        ({"app": "c"}, {}, "c"),
        ({"app": "c"}, {"SILKBUS_APP": "b"}, "b"),
        ({"app": "c", "metadata": {"policy_group_id": "a"}}, {"SILKBUS_APP": "b"}, "a"),
        ({"app": "c", "metadata": {}}, {}, "c"),
        ({"metadata": None}, {"K8S_POD_NAME": "x"}, None),
        ({"apps": {"x": "c"}}, {"K8S_POD_NAME": "x"}, "c"),
        ({"apps": {"x": "c"}, "app": "d"}, {"K8S_POD_NAME": "y"}, "d"),
        ({"apps": {"x": "c"}}, {"K8S_POD_NAME": "x", "SILKBUS_APP": "b"}, "b"),
    ],
)
def test_where_the_app_comes_from(config: dict[str, Any], arguments: dict[str, str], app: str | None) -> None:
    assert identity_of(config, arguments).app == app


@pytest.mark.parametrize("config", [{"app": ""}, {"app": 7}, {"metadata": []}, {"metadata": {"policy_group_id": ""}}])
def test_an_app_must_be_a_name(config: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        identity_of(config, {})


@pytest.mark.parametrize(
    ("previous", "problem"),
    [
        (None, None),
        (7, None),
        ({"ips": [7, {"address": 7}], "interfaces": 7}, "its address"),
        ({"ips": [{"address": "10.255.30.2/32"}]}, None),
        ({"ips": [{"address": "10.255.30.3/32"}]}, "its address is 10.255.30.2, prevResult has 10.255.30.3"),
        ({"interfaces": [{"name": "s-1", "mac": "aa:aa:00:00:00:01"}, {"name": "eth0"}]}, None),
        ({"interfaces": [{"name": "s-1"}, {"name": "eth0", "mac": "ee:00:00:00:00:00"}]}, "the MAC address of eth0"),
        ({"interfaces": [{"name": "s-2"}, {"name": "eth0"}]}, "its interface s-1 is not in prevResult"),
    ],
)
def test_what_contradicts_a_previous_result(previous: object, problem: str | None) -> None:
    attachment = Attachment(Handle("c1"), "/run/netns/c1", "eth0", "overlay", link=LINK)
    found = cni.contradiction({"prevResult": previous}, attachment)
    assert found is None if problem is None else problem in (found or "")
