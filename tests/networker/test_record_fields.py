"""What a record says of a container, from what its runtime says: who it is, its forwards, what it may reach."""

import json
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.decode import Fields, Malformed
from bus.messages import PortForward, Protocol, Workload
from bus.security_groups import AddressRange, EgressProtocol, EgressRule
from services.networker import cni
from services.networker.egress import egress_rules
from services.networker.forwards import port_forwards
from services.networker.identity import identity_of
from services.networker.record import Attachment
from tests.networker.test_cni import JSON

ANYWHERE = (AddressRange.parse("0.0.0.0/0"),)
GARDEN = {
    "policy_group_id": "group",
    "app_id": "app",
    "space_id": "space",
    "org_id": "org",
    "ports": "8080, 9999,8080",
    "container_workload": "staging",
}


def attachment(args: str = "", **config: Any) -> Attachment:
    call = {
        "command": "ADD",
        "container_id": "c1",
        "netns": "/run/netns/c1",
        "ifname": "eth0",
        "args": args,
        "path": "/opt/cni/bin",
        "config": json.dumps({"cniVersion": "1.0.0", "name": "overlay", "type": "silkbus-cni", **config}),
    }
    return cni.parse(Fields({name: value for name, value in call.items() if value}, "call")).attachment()


def test_properties_of_garden() -> None:
    identity = identity_of({"metadata": GARDEN}, {})
    assert (identity.app, identity.space, identity.workload) == ("group", "space", Workload.STAGING)
    assert identity.ports == (8080, 9999)
    assert identity.metadata == GARDEN


def test_other_runtimes_say_the_same() -> None:
    arguments = {"SILKBUS_APP": "a", "SILKBUS_SPACE": "s", "SILKBUS_ORG": "o", "SILKBUS_WORKLOAD": "task"}
    for identity in (
        identity_of({}, arguments),
        identity_of({"app": "a", "space": "s", "org": "o", "workload": "task"}, {}),
    ):
        assert (identity.app, identity.space, identity.workload) == ("a", "s", Workload.TASK)
        assert identity.metadata == {
            "policy_group_id": "a",
            "space_id": "s",
            "org_id": "o",
            "container_workload": "task",
        }


def test_a_workload_that_we_do_not_know_is_none() -> None:
    identity = identity_of({"metadata": {"container_workload": "lrp"}}, {})
    assert identity.workload is None
    assert identity.metadata == {"container_workload": "lrp"}


@pytest.mark.parametrize("ports", [8080, "8080-9090", "0", "70000", "8080,,9090", "\u0668", [8080]])
def test_ports_that_are_none(ports: object) -> None:
    with pytest.raises(Malformed, match="ports"):
        identity_of({"metadata": {"ports": ports}}, {})


@pytest.mark.parametrize(
    ("mapping", "forward"),
    [
        ({"host_port": 61000, "container_port": 8080}, PortForward(61000, 8080)),
        ({"hostPort": 53, "containerPort": 5353, "protocol": "UDP"}, PortForward(53, 5353, Protocol.UDP)),
        ({"hostPort": 1, "containerPort": 2, "protocol": "", "hostIP": "::"}, PortForward(1, 2)),
        (
            {"hostPort": 1, "containerPort": 2, "hostIP": "10.0.0.5"},
            PortForward(1, 2, host_address=IPv4Address("10.0.0.5")),
        ),
        ({"hostPort": 0, "containerPort": 2}, None),
    ],
)
def test_port_mappings(mapping: dict[str, Any], forward: PortForward | None) -> None:
    assert attachment(runtimeConfig={"portMappings": [mapping]}).forwards == (() if forward is None else (forward,))


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({}, "host_port: missing"),
        ({"host_port": 0, "container_port": 1}, "host_port: must be in 1..65535, not 0"),
        ({"host_port": 1, "container_port": 0}, "container_port: must be in 1..65535"),
        ({"host_port": 70000, "container_port": 1}, "host_port: must be in 0..65535"),
        ({"hostPort": "1", "containerPort": 1}, "hostPort: must be an integer"),
        ({"hostPort": 1, "containerPort": 1, "protocol": "sctp"}, "protocol: only tcp and udp"),
        ({"hostPort": 1, "containerPort": 1, "hostIP": "fe80::1"}, "hostIP: not an IPv4 address"),
        (7, "must be a mapping"),
    ],
)
def test_port_mappings_that_are_none(mapping: Any, text: str) -> None:
    with pytest.raises(Malformed, match=r"mappings\[1\]") as caught:
        port_forwards([{"host_port": 1, "container_port": 1}, mapping], "mappings")
    assert text in str(caught.value)


def egress(**rule: Any) -> EgressRule:
    (valid,), problems = egress_rules([rule], "rules")
    assert problems == []
    return valid


def test_egress_rules() -> None:
    networks = [{"start": "10.0.0.1", "end": "10.0.0.255"}, {"start": "8.8.8.8"}]
    destinations = (AddressRange.parse("10.0.0.1-10.0.0.255"), AddressRange.parse("8.8.8.8"))
    ports = [{"start": 80, "end": 90}, {"start": 443}]
    expected = EgressRule(EgressProtocol.TCP, destinations, ((80, 90), (443, 443)), log=True)
    assert egress(protocol=1, networks=networks, ports=ports, log=True) == expected
    assert egress() == EgressRule(EgressProtocol.ALL, ANYWHERE)
    assert egress(protocol=2, ports=[{"start": 53, "end": 53}]) == EgressRule(EgressProtocol.UDP, ANYWHERE, ((53, 53),))


@pytest.mark.parametrize(
    ("icmps", "expected"),
    [
        ({"type": 8, "code": 0}, (8, 0)),
        ({"code": 0}, (0, 0)),
        ({"type": 3, "code": 255}, (3, None)),
        ({"type": 255, "code": 255}, (None, None)),
        ({"type": 255, "code": 3}, (None, None)),
    ],
)
def test_icmp(icmps: dict[str, int], expected: tuple[int | None, int | None]) -> None:
    rule = egress(protocol=3, icmps=icmps)
    assert (rule.icmp_type, rule.icmp_code) == expected


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"protocol": 9}, "protocol: must be 0 (all)"),
        ({"protocol": "tcp"}, "protocol: must be an integer"),
        ({"protocol": 1}, "UDP/TCP rule must specify ports"),
        ({"protocol": 3}, "ICMP rule must specify ICMP type/code"),
        ({"protocol": 3, "icmps": {"type": 8}}, "ICMP rule must specify ICMP type/code"),
        ({"protocol": 3, "icmps": {"type": 8, "code": 0}, "ports": [{"start": 1}]}, "ICMP rule must not specify ports"),
        ({"ports": [{"start": 1}]}, "must not specify ports"),
        ({"protocol": 1, "ports": [{"start": 90, "end": 80}]}, "90-80 is not a range"),
        ({"protocol": 1, "ports": [{"start": 0, "end": 80}]}, "start: must be in 1..65535"),
        ({"networks": [{}]}, "start: missing"),
        ({"networks": [{"start": "banana"}]}, "not an IPv4 address"),
        ({"networks": [{"start": "10.0.0.2", "end": "10.0.0.1"}]}, "no range"),
        ({"log": "yes"}, "log: must be true or false"),
        (None, "must be a mapping"),
    ],
)
def test_a_bad_rule_lets_nothing_out_and_keeps_no_other_from_it(rule: Any, text: str) -> None:
    valid, problems = egress_rules([{}, rule, {}], "netout_rules")
    assert valid == (EgressRule(EgressProtocol.ALL, ANYWHERE),) * 2
    assert len(problems) == 1
    assert problems[0].startswith("netout_rules[1]")
    assert text in problems[0]


@given(
    st.lists(JSON | st.fixed_dictionaries({}, optional={"protocol": st.integers(0, 4), "ports": JSON, "icmps": JSON}))
)
def test_any_rules_are_read_or_refused_one_by_one(rules: list[Any]) -> None:
    valid, problems = egress_rules(rules, "rules")
    assert len(valid) + len(problems) == len(rules)


def test_wishes_to_the_silk_worker() -> None:
    bandwidth = {"ingressRate": 8000, "ingressBurst": 80000}
    wanted = attachment("IgnoreUnknown=1;MAC=AA:bb:cc:dd:ee:01;IP=10.255.30.77", runtimeConfig={"bandwidth": bandwidth})
    assert wanted.wishes == {"bandwidth": bandwidth, "address": "10.255.30.77", "mac": "aa:bb:cc:dd:ee:01"}
    wanted = attachment(runtimeConfig={"ips": ["10.255.30.9/24"], "mac": "aa:bb:cc:dd:ee:02"})
    assert wanted.wishes == {"address": "10.255.30.9", "mac": "aa:bb:cc:dd:ee:02"}


def test_what_is_asked_for_must_be_one_address() -> None:
    for runtime in ({"ips": ["10.255.30.9/24", "10.255.30.10/24"]}, {"ips": ["fe80::1/64"]}, {"ips": 7}, {"mac": 7}):
        with pytest.raises(cni.CniError, match="runtimeConfig"):
            attachment(runtimeConfig=runtime)
