"""The rules of security groups, read strictly; and as they travel."""

import re
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.decode import Fields, Malformed
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SecurityGroup, SpaceId
from bus.wire import pack, unpack
from services.policy.asg_rules import parse_group, parse_rule, parse_rules
from tests.policy.stubs import rule, security_group


def group(**more: Any) -> dict[str, Any]:
    return {**security_group("g", rule()), **more}


def test_a_group_as_the_cloud_controller_lists_it() -> None:
    resource = security_group(
        "guid-1",
        {"protocol": "tcp", "destination": "10.10.10.0/24", "ports": "443,80,8080-8090"},
        {
            "protocol": "icmp",
            "destination": "10.10.10.1-10.10.10.9,1.1.1.1",
            "type": 8,
            "code": 0,
            "description": "ping",
        },
        {"protocol": "all", "destination": "0.0.0.0/0", "log": True},
        name="mine",
        running=True,
        running_spaces=["s1", "s2"],
    )
    listed = parse_group(Fields(resource, "resource"))
    assert listed.bad_rules == ()
    assert listed.group == SecurityGroup(
        GroupId("guid-1"),
        "mine",
        (
            EgressRule(EgressProtocol.TCP, (ranged("10.10.10.0/24"),), ((443, 443), (80, 80), (8080, 8090))),
            EgressRule(
                EgressProtocol.ICMP,
                (ranged("10.10.10.1-10.10.10.9"), ranged("1.1.1.1")),
                icmp_type=8,
                icmp_code=0,
                description="ping",
            ),
            EgressRule(EgressProtocol.ALL, (ranged("0.0.0.0/0"),), log=True),
        ),
        running_default=True,
        running_spaces=frozenset({SpaceId("s1"), SpaceId("s2")}),
    )


def ranged(text: str) -> AddressRange:
    return AddressRange.parse(text)


def test_the_form_that_the_original_stores() -> None:
    """All keys, those that are absent with Go's zero values (contract/policy.md 3)."""
    stored = {"ports": "", "type": 0, "code": 0, "description": "", "log": False}
    assert parse_rule({"protocol": "all", "destination": "1.0.0.0/8", **stored}) == parse_rule(rule("all", "1.0.0.0/8"))
    icmp = parse_rule({"protocol": "icmp", "destination": "1.0.0.0/8", **stored})
    assert (icmp.icmp_type, icmp.icmp_code) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "code", "expected"), [(-1, -1, (None, None)), (255, 255, (None, None)), (8, -1, (8, None)), (0, 0, (0, 0))]
)
def test_icmp_any(kind: int, code: int, expected: tuple[int | None, int | None]) -> None:
    parsed = parse_rule(rule("icmp", type=kind, code=code))
    assert (parsed.icmp_type, parsed.icmp_code) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.1/32", "10.0.0.1"),
        ("172.16.1.0/12", "172.16.0.0/12"),
        ("10.0.0.0-10.0.0.255", "10.0.0.0/24"),
        ("10.0.0.1-10.0.0.255", "10.0.0.1-10.0.0.255"),
        (" 10.0.0.1 - 10.0.0.2 ", "10.0.0.1-10.0.0.2"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("0.0.0.0-255.255.255.255", "0.0.0.0/0"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(parse_rule(rule(destination=text)).destinations[0]) == shown


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("text", "must be a mapping, not str"),
        ({}, "protocol: missing"),
        (rule("icmpv6", type=1, code=1), "protocol: icmpv6: containers have no IPv6"),
        (rule("TCP"), "protocol: must be one of tcp, udp, icmp, all, not 'TCP'"),
        (rule(protocol=6), "protocol: must be text, not int"),
        (rule(destination=""), "destination: missing"),
        (rule(destination="10.0.0.0/33"), "destination: addresses: '10.0.0.0/33' is no IPv4 address"),
        (rule(destination="10.0.0.0/255.0.0.0"), "is no IPv4 address, network or range"),
        (rule(destination="10.0.0.01"), "is no IPv4 address"),
        (rule(destination="example.com"), "is no IPv4 address"),
        (rule(destination="10.0.0.1,"), "is no IPv4 address"),
        (rule(destination="10.0.0.9-10.0.0.1"), "its start must not be after its end"),
        (rule(destination="10.0.0.0/8-10.0.0.1"), "is no IPv4 address"),
        (rule(destination="10.0.0.1,2001:db8::/32"), "2001:db8::/32: containers have no IPv6"),
        (rule("tcp", ports=None), "ports: required for tcp"),
        (rule("udp", ports=""), "ports: required for udp"),
        (rule("all", ports="1"), "ports: not possible for all"),
        (rule("icmp", type=1, code=1, ports="1"), "ports: not possible for icmp"),
        (rule(ports=443), "ports: must be text, not int"),
        (rule(ports="70000"), "ports: 70000-70000 is not a range within 1-65535"),
        (rule(ports="0"), "ports: 0-0 is not a range"),
        (rule(ports="9-8"), "ports: 9-8 is not a range"),
        (rule(ports="443,https"), "ports: 'https' is neither a port nor a range of ports"),
        (rule(ports="443,"), "ports: '' is neither"),
        (rule(ports="٤٤٣"), "is neither a port"),
        (rule("icmp"), "type: missing"),
        (rule("icmp", type=8), "code: missing"),
        (rule("icmp", type=256, code=0), "type: must be in -1..255"),
        (rule("icmp", type=True, code=0), "type: must be an integer"),
        (rule("icmp", type=-1, code=3), "code: any type goes with any code (-1) only"),
        (rule(log="yes"), "log: must be true or false"),
        (rule(description=7), "description: must be text"),
        (rule(description="\ud83d"), "description: must be Unicode text"),
    ],
)
def test_a_bad_rule_is_named_and_the_others_are_kept(bad: Any, why: str) -> None:
    rules, problems = parse_rules([rule("all", "1.1.1.1"), bad, rule("all", "2.2.2.2")])
    assert [str(item.destinations[0]) for item in rules] == ["1.1.1.1", "2.2.2.2"]
    (problem,) = problems
    assert problem.startswith("rule 2: ")
    assert why in problem
    listed = parse_group(Fields(security_group("guid-1", bad, name="mine"), "resource"))
    assert listed.bad_rules == (f"security group 'mine' (guid-1): {problem.replace('rule 2', 'rule 1')}",)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"guid": ""}, "guid: must not be empty"),
        ({"name": None}, "name: missing"),
        ({"rules": None}, "rules: missing"),
        ({"rules": {}}, "rules: must be a list"),
        ({"globally_enabled": {"running": True}}, "staging: missing"),
        ({"relationships": {"running_spaces": {"data": []}}}, "relationships"),
        (
            {"relationships": {"running_spaces": {"data": [{"name": "x"}]}, "staging_spaces": {"data": []}}},
            "running_spaces.data: guid: missing",
        ),
    ],
)
def test_what_is_wrong_outside_the_rules_makes_the_group_unusable(more: dict[str, Any], why: str) -> None:
    with pytest.raises(Malformed, match=re.escape(why)):
        parse_group(Fields(group(**more), "resource"))


def test_long_descriptions_are_cut() -> None:
    assert parse_rule(rule(description="x" * 5000)).description == "x" * 1000


addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
ranges = st.one_of(
    st.lists(addresses, min_size=2, max_size=2).map(sorted).map(lambda pair: f"{pair[0]}-{pair[1]}"),
    addresses.map(str),
    st.tuples(addresses, st.integers(0, 32)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
)
port_pairs = st.lists(st.integers(1, 65535), min_size=2, max_size=2).map(sorted)
port_texts = st.lists(port_pairs.map(lambda pair: f"{pair[0]}-{pair[1]}"), min_size=1, max_size=4).map(",".join)
rules = st.one_of(
    st.builds(rule, st.sampled_from(["tcp", "udp"]), ranges, ports=port_texts, log=st.booleans()),
    st.builds(rule, st.just("icmp"), ranges, type=st.integers(0, 254), code=st.integers(-1, 255)),
    st.builds(rule, st.just("icmp"), ranges, type=st.just(-1), code=st.just(-1)),
    st.builds(
        rule,
        st.just("all"),
        ranges,
        description=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    ),
)


@given(st.lists(rules, max_size=5))
def test_what_is_good_is_understood_and_travels_unchanged(items: list[dict[str, Any]]) -> None:
    listed = parse_group(Fields(security_group("g", *items, running_spaces=["b", "a"]), "resource"))
    assert listed.bad_rules == ()
    assert SecurityGroup.decode(GroupId("g"), unpack(pack(listed.group.encode()), "test")) == listed.group
    for item, parsed in zip(items, listed.group.rules, strict=True):
        (addresses,) = parsed.destinations
        first, dash, last = item["destination"].partition("-")
        if dash:
            assert (str(addresses.first), str(addresses.last)) == (first, last)
        else:
            network = IPv4Network(item["destination"], strict=False)
            assert (addresses.first, addresses.last) == (network[0], network[-1])
        if "ports" in item:
            assert ",".join(f"{start}-{end}" for start, end in parsed.ports) == item["ports"]
        assert AddressRange.parse(str(addresses)) == addresses


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
odd_texts = st.text("0123456789./-, :ab", max_size=12)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "protocol": st.sampled_from(["tcp", "udp", "icmp", "all", "icmpv6"]) | junk,
            "destination": ranges | odd_texts | junk,
            "ports": port_texts | odd_texts | junk,
            "type": st.integers(-2, 256) | junk,
            "code": st.integers(-2, 256) | junk,
            "log": st.booleans() | junk,
            "description": junk,
        },
    )
    | junk
)
def test_whatever_comes_is_a_sound_rule_or_a_named_problem(item: Any) -> None:
    understood, problems = parse_rules([item])
    assert len(understood) + len(problems) == 1
    for problem in problems:
        assert problem.startswith("rule 1: ")
    for parsed in understood:
        assert EgressRule.decode(unpack(pack(parsed.encode()), "test")) == parsed
