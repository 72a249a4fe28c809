"""Desired state as text: what is rendered, how it is split, what is written for a difference."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.decode import Malformed
from bus.messages import Container, Handle, PortForward, Ports, Protocol, Revision, Stage, Tag, Workload
from bus.security_groups import EgressRule, SpaceId
from bus.settings import load
from bus.tables import Update
from services.enforcer.desired import dispatch, family_of
from services.enforcer.egress import egress_chains, list_rules
from services.enforcer.fixed import fence, static, static_v6
from services.enforcer.forwarding import forwarding_chains
from services.enforcer.groups import Groups, RuleList
from services.enforcer.iptables import Picture, difference, parse
from services.enforcer.rules import ChainId, Chains, rule
from services.enforcer.settings import EnforcerSettings
from services.enforcer.tree import Sources, allowing, app_chains, levels
from tests.enforcer.outside import group, may

SETTINGS = EnforcerSettings(cell="c", iptables="nft")
HTTP = Ports(Protocol.TCP, 80, 80)


def text(chains: Chains) -> str:
    """As iptables-restore takes it, without the comments."""
    return "\n".join(
        f"{chain.table} {chain.name} {rule.match} -j {rule.target}".replace("  ", " ")
        for chain, rules in chains.items()
        for rule in rules
    )


def test_the_fixed_chains_are_these() -> None:
    assert text(static(SETTINGS, peers_known=True, guests=True)) == (
        "raw PREROUTING -i s-+ -j sb-raw-link\n"
        "raw PREROUTING -m devgroup --src-group 0x7362 -j sb-raw-link\n"
        "raw PREROUTING -p udp -m udp --dport 4789 -m addrtype --dst-type LOCAL -j sb-raw-vxlan\n"
        "raw sb-raw-link -m rpfilter --invert -j DROP\n"
        "raw sb-raw-link -p udp -m udp --dport 4789 -j DROP\n"
        "raw sb-raw-vxlan -m set ! --match-set sb-peers src -j DROP\n"
        "raw sb-raw-vxlan -j CT --notrack\n"
        "raw OUTPUT -p udp -m udp --dport 4789 -j CT --notrack\n"
        "mangle PREROUTING -i s-+ -j sb-mark\n"
        "mangle PREROUTING -m devgroup --src-group 0x7362 -j sb-mark\n"
        "mangle sb-mark -j SET --map-set sb-tag src --map-mark\n"
        "mangle sb-mark -m conntrack --ctdir REPLY -m connmark ! --mark 0x0/0xffff -j MARK"
        " --set-xmark 0x80000/0x80000\n"
        "mangle OUTPUT -o silk-vtep -j MARK --set-xmark 0x80000/0x80000\n"
        "filter FORWARD -i s-+ -j sb-forward\n"
        "filter FORWARD -m devgroup --src-group 0x7362 -j sb-forward\n"
        "filter FORWARD -o s-+ -j sb-forward\n"
        "filter FORWARD -m devgroup --dst-group 0x7362 -j sb-forward\n"
        "filter FORWARD -i silk-vtep -j sb-forward\n"
        "filter FORWARD -o silk-vtep -j sb-forward\n"
        "filter sb-forward -m connmark --mark 0x80000000/0x80000000 -j sb-cut\n"
        "filter sb-forward ! -i s-+ -m devgroup ! --src-group 0x7362 -s 10.255.0.0/16 -m conntrack"
        " --ctstate RELATED,ESTABLISHED --ctdir REPLY -m mark ! --mark 0x80000/0x80000 -j DROP\n"
        "filter sb-forward -m conntrack --ctstate RELATED,ESTABLISHED --ctdir ORIGINAL -m connmark ! --mark 0x0/0xffff"
        " -j sb-opener\n"
        "filter sb-forward -s 10.255.0.0/16 -o s-+ -m conntrack --ctstate RELATED,ESTABLISHED --ctdir ORIGINAL"
        " -j sb-new\n"
        "filter sb-forward -s 10.255.0.0/16 -m devgroup --dst-group 0x7362 -m conntrack --ctstate RELATED,ESTABLISHED"
        " --ctdir ORIGINAL -j sb-new\n"
        "filter sb-forward -i s-+ -o s-+ -m connmark --mark 0x0/0xffff -m conntrack"
        " --ctstate RELATED,ESTABLISHED --ctdir REPLY -j sb-deny-in\n"
        "filter sb-forward -i s-+ -m devgroup --dst-group 0x7362 -m connmark --mark 0x0/0xffff -m conntrack"
        " --ctstate RELATED,ESTABLISHED --ctdir REPLY -j sb-deny-in\n"
        "filter sb-forward -m devgroup --src-group 0x7362 -o s-+ -m connmark --mark 0x0/0xffff -m conntrack"
        " --ctstate RELATED,ESTABLISHED --ctdir REPLY -j sb-deny-in\n"
        "filter sb-forward -m devgroup --src-group 0x7362 -m devgroup --dst-group 0x7362"
        " -m connmark --mark 0x0/0xffff -m conntrack --ctstate RELATED,ESTABLISHED --ctdir REPLY -j sb-deny-in\n"
        "filter sb-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
        "filter sb-forward -p tcp -m conntrack --ctstate INVALID -j DROP\n"
        "filter sb-forward -j sb-new\n"
        "filter sb-opener -j CONNMARK --restore-mark --nfmask 0x0 --ctmask 0xffff\n"
        "filter sb-opener -m mark --mark 0x0/0xffff -j ACCEPT\n"
        "filter sb-opener -j CONNMARK --restore-mark --nfmask 0x0 --ctmask 0xffff\n"
        "filter sb-opener -j sb-new\n"
        "filter sb-new -o s-+ -j sb-in\n"
        "filter sb-new -m devgroup --dst-group 0x7362 -j sb-in\n"
        "filter sb-new -i s-+ -j sb-out\n"
        "filter sb-new -m devgroup --src-group 0x7362 -j sb-out\n"
        "filter sb-new -j sb-deny-out\n"
        "filter sb-in -i s-+ -j sb-to\n"
        "filter sb-in -m devgroup --src-group 0x7362 -j sb-to\n"
        "filter sb-in -i silk-vtep -j sb-to\n"
        "filter sb-in -m conntrack --ctstate DNAT -j ACCEPT\n"
        "filter sb-in -j sb-deny-in\n"
        "filter sb-out -o silk-vtep -p tcp -m tcp ! --syn -m conntrack --ctstate NEW -j DROP\n"
        "filter sb-out -p tcp -o silk-vtep -d 10.255.0.0/16 -m conntrack --ctstate NEW -m mark ! --mark 0x0/0xffff"
        " -j ACCEPT\n"
        "filter sb-out -p udp -o silk-vtep -d 10.255.0.0/16 -m conntrack --ctstate NEW -m mark ! --mark 0x0/0xffff"
        " -j ACCEPT\n"
        "filter sb-out -o silk-vtep -j sb-deny-out\n"
        "filter sb-out -d 10.255.0.0/16 -j sb-deny-out\n"
        "filter sb-out -j sb-deny-always\n"
        "filter sb-out -j sb-from\n"
        "filter sb-out -j sb-deny-out\n"
        "filter sb-cut -m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 1 --hashlimit-mode srcip"
        " --hashlimit-name sb-revoked-srcip-1 -j NFLOG --nflog-prefix sb:denied:revoked --nflog-group 7362\n"
        "filter sb-cut -p tcp -j REJECT --reject-with tcp-reset\n"
        "filter sb-cut -j REJECT --reject-with icmp-port-unreachable\n"
        "filter sb-accept -j CONNMARK --save-mark --nfmask 0xffff --ctmask 0xffff\n"
        "filter sb-accept -j ACCEPT\n"
        "filter INPUT -i s-+ -j sb-input\n"
        "filter INPUT -m devgroup --src-group 0x7362 -j sb-input\n"
        "filter INPUT -i silk-vtep -j sb-input-vtep\n"
        "filter sb-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
        "filter sb-input -j sb-deny-out\n"
        "filter sb-input-vtep -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
        "filter sb-input-vtep -j DROP\n"
        "filter sb-deny-in -m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 1 --hashlimit-mode dstip"
        " --hashlimit-name sb-nothing-dstip-1 -j NFLOG --nflog-prefix sb:denied:nothing --nflog-group 7362\n"
        "filter sb-deny-in -j REJECT --reject-with icmp-port-unreachable\n"
        "filter sb-deny-out -m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 1 --hashlimit-mode srcip"
        " --hashlimit-name sb-nothing-srcip-1 -j NFLOG --nflog-prefix sb:denied:nothing --nflog-group 7362\n"
        "filter sb-deny-out -j REJECT --reject-with icmp-port-unreachable\n"
        "nat PREROUTING -j sb-nat\n"
        "nat POSTROUTING -m set --match-set sb-tag src -j sb-masquerade\n"
        "nat sb-masquerade -o silk-vtep -j RETURN\n"
        "nat sb-masquerade -o s-+ -j RETURN\n"
        "nat sb-masquerade -m devgroup --dst-group 0x7362 -j RETURN\n"
        "nat sb-masquerade -d 10.255.0.0/16 -j RETURN\n"
        "nat sb-masquerade -j MASQUERADE\n"
        "filter sb-deny-always -d 169.254.169.254/32 -j sb-deny-out\n"
        "filter sb-let-out ! -p udp -j NFLOG --nflog-prefix sb:allowed:group --nflog-group 7362\n"
        "filter sb-let-out -p udp -m hashlimit --hashlimit-upto 100/sec --hashlimit-burst 100 --hashlimit-mode srcip"
        " --hashlimit-name sb-ok-group-100 -j NFLOG --nflog-prefix sb:allowed:group --nflog-group 7362\n"
        "filter sb-let-out -j ACCEPT\n"
        "filter sb-deny-rate -m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 1 --hashlimit-mode srcip"
        " --hashlimit-name sb-rate-srcip-1 -j NFLOG --nflog-prefix sb:denied:rate --nflog-group 7362\n"
        "filter sb-deny-rate -j REJECT --reject-with icmp-port-unreachable"
    )
    assert "sb-peers" not in text(fence(SETTINGS))
    assert text(static_v6(SETTINGS)).endswith("filter sb-v6 -j DROP")
    assert [made.target for made in dispatch(set())] == ["DROP", "sb-deny-in"]


def test_without_containers_of_other_plugins_no_packet_pays_for_them() -> None:
    with_them = text(static(SETTINGS, peers_known=True, guests=True)).splitlines()
    without = text(static(SETTINGS, peers_known=True, guests=False)).splitlines()
    none_known = [line.replace(" -m devgroup ! --src-group 0x7362", "") for line in with_them]
    assert without == [line for line in none_known if "devgroup" not in line or line.startswith("nat ")]
    assert len(with_them) - len(without) == 12
    assert "raw PREROUTING -m devgroup" in text(fence(SETTINGS)), "nobody is known yet"


def test_beside_the_original_unmarked_answers_pass_and_nothing_else_differs() -> None:
    ours = text(static(SETTINGS, peers_known=True, guests=True)).splitlines()
    mixed = text(static(replace(SETTINGS, unmarked_answers=True), peers_known=True, guests=True)).splitlines()
    (left_out,) = [line for line in ours if line not in mixed]
    assert left_out.startswith("filter sb-forward ! -i s-+ -m devgroup ! --src-group 0x7362 -s 10.255.0.0/16")
    assert [line for line in ours if line != left_out] == mixed


def test_an_overlay_of_two_networks_is_both_of_them_in_each_place() -> None:
    two = replace(SETTINGS, overlay_network=(IPv4Network("10.255.0.0/16"), IPv4Network("10.250.0.0/16")))
    one, both = (text(static(each, peers_known=True, guests=True)).splitlines() for each in (SETTINGS, two))
    first = [line for line in one if "10.255.0.0/16" in line]
    assert len(first) == 7
    assert [line for line in both if line not in one] == [line.replace("10.255", "10.250") for line in first]
    assert [line for line in both if "10.250" not in line] == one


def test_a_policy_is_one_rule() -> None:
    made = allowing(Tag(0x12), Ports(Protocol.UDP, 100, 200))
    assert made.specification == (
        f"-p udp -m mark --mark 0x12/0xffff -m udp --dport 100:200 -m comment --comment sb:{made.hash} -j sb-accept"
    )


@pytest.mark.parametrize(("sources", "depth"), [(0, 0), (64, 0), (65, 1), (1024, 1), (1025, 2), (10_000, 2)])
def test_a_chain_is_split_as_far_as_needed(sources: int, depth: int) -> None:
    assert levels(sources) == depth
    chains = app_chains("sb-a-0123456789abcdef", {Tag(n): (HTTP,) for n in range(1, sources + 1)})
    assert len(chains) == {0: 1, 1: 17, 2: 273}[depth]
    assert all(len(chain.name) <= 28 and family_of(chain.name) == "sb-a-0123456789abcdef" for chain in chains)
    leaves = [rules for rules in chains.values() if not rules or rules[0].target == "sb-accept"]
    assert sum(map(len, leaves)) == sources
    assert max(map(len, leaves)) <= 64


def walk(chains: Chains, name: str, tag: int) -> set[str]:
    """What a packet with this tag meets: a reader of our own rendering, for the tree only."""
    met = set()
    for made in chains[ChainId("filter", name)]:
        value, mask = made.match.split("--mark ")[1].split()[0].split("/")
        if tag & int(mask, 16) == int(value, 16):
            met |= {made.match} if made.target == "sb-accept" else walk(chains, made.target, tag)
    return met


@given(st.dictionaries(st.integers(1, 0xFFFF).map(Tag), st.just((HTTP,)), min_size=1, max_size=1500))
@settings(max_examples=20, deadline=None)
def test_splitting_changes_nothing_for_anybody(sources: Sources) -> None:
    chains = app_chains("sb-a-x", sources)
    for tag in list(sources)[:50]:
        assert walk(chains, "sb-a-x", tag) == {allowing(tag, HTTP).match}
    for tag in {1, 0x10, 0xFFFF} - set(sources):
        assert walk(chains, "sb-a-x", tag) == set()


def test_only_what_differs_is_written_and_foreign_rules_stay() -> None:
    first, second = rule("-i s-+", to="sb-x"), rule("-o s-+", to="sb-x")
    inner = rule(to="DROP")
    picture = Picture()
    parse(
        "filter",
        "*filter\n:FORWARD ACCEPT [0:0]\n:DOCKER - [0:0]\n:sb-x - [0:0]\n:sb-old - [0:0]\n"
        f"-A FORWARD {first.specification}\n"
        "-A FORWARD -j DOCKER\n"
        f'-A sb-x -m comment --comment "sb:{inner.hash}" -j DROP\nCOMMIT\n',
        picture,
    )
    forward, own = ChainId("filter", "FORWARD"), ChainId("filter", "sb-x")
    assert picture.own == {own: (inner.hash,), ChainId("filter", "sb-old"): ()}
    assert not difference(picture, {forward: (first,), own: (inner,)})
    edit = difference(picture, {forward: (second, first), own: (inner,), ChainId("raw", "sb-new"): (inner,)})
    assert edit.text == (
        f"*raw\n:sb-new - [0:0]\n-A sb-new {inner.specification}\nCOMMIT\n"
        f"*filter\n-D FORWARD {first.specification}\n-I FORWARD 1 {second.specification}\n"
        f"-I FORWARD 2 {first.specification}\nCOMMIT\n"
    )


def test_a_jump_of_ours_that_is_not_first_is_moved() -> None:
    jump = rule("-i s-+", to="sb-x")
    picture = Picture()
    parse("filter", f":FORWARD ACCEPT [0:0]\n-A FORWARD -j OTHER\n-A FORWARD {jump.specification}\n", picture)
    edit = difference(picture, {ChainId("filter", "FORWARD"): (jump,)})
    assert edit.lines == {"filter": [f"-D FORWARD {jump.specification}", f"-I FORWARD 1 {jump.specification}"]}


def of_list(*rules: EgressRule) -> list[str]:
    return [f"{made.match} -j {made.target}".lstrip() for made in list_rules(RuleList.of(rules))]


def test_rules_of_a_group_are_one_for_each_destination_and_15_ports() -> None:
    assert of_list(may("tcp", "10.0.0.0/8,10.0.0.1-10.0.0.7,1.2.3.4", 80, (8000, 8100))) == [
        "-d 10.0.0.0/8 -p tcp -m multiport --dports 80,8000:8100 -j ACCEPT",
        "-m iprange --dst-range 10.0.0.1-10.0.0.7 -p tcp -m multiport --dports 80,8000:8100 -j ACCEPT",
        "-d 1.2.3.4 -p tcp -m multiport --dports 80,8000:8100 -j ACCEPT",
    ]
    assert of_list(may("udp", "0.0.0.0/0", 53)) == ["-p udp -m udp --dport 53 -j ACCEPT"]
    assert of_list(may("tcp", "0.0.0.0-255.255.255.255", (1, 65535))) == ["-p tcp -j ACCEPT"]
    assert of_list(may("all", "0.0.0.0/0")) == ["-j ACCEPT"]
    assert of_list(may("icmp", "1.2.3.4")) == ["-d 1.2.3.4 -p icmp -j ACCEPT"]
    assert of_list(may("icmp", "1.2.3.4", icmp=(0, None))) == ["-d 1.2.3.4 -p icmp -m icmp --icmp-type 0 -j ACCEPT"]
    assert of_list(may("icmp", "1.2.3.4", icmp=(3, 0))) == ["-d 1.2.3.4 -p icmp -m icmp --icmp-type 3/0 -j ACCEPT"]
    many = of_list(may("tcp", "1.2.3.4", *range(1, 15), (100, 200), 300))
    assert [line.split()[7] for line in many] == [",".join(map(str, range(1, 15))), "100:200,300"]
    assert len(of_list(*[may("tcp", "1.2.3.4", 80)] * 2, may("tcp", "1.2.3.4", 80, 80))) == 1


def test_what_logs_comes_first_whatever_the_order() -> None:
    quiet = may("all", "0.0.0.0/0")
    assert of_list(quiet, replace(quiet, log=True)) == ["-j sb-let-out", "-j ACCEPT"]


@given(st.lists(st.integers(1, 65535) | st.tuples(st.integers(1, 400), st.integers(400, 65535)), min_size=1))
@settings(deadline=None)
def test_bundles_of_ports_hold_15_and_lose_none(ports: list[int | tuple[int, int]]) -> None:
    made = of_list(may("tcp", "1.2.3.4", *ports))
    told = [span for line in made if "port" in line for span in line.split(" -j ")[0].split()[-1].split(",")]
    spans = {(each, each) if isinstance(each, int) else each for each in ports}
    if (1, 65535) in spans:
        assert made == ["-d 1.2.3.4 -p tcp -j ACCEPT"]
        return
    assert {(int(span.split(":")[0]), int(span.split(":")[-1])) for span in told} == spans
    for line in made:
        assert sum(1 + (":" in span) for span in line.split(" -j ")[0].split()[-1].split(",")) <= 15


def test_equal_lists_and_combinations_are_held_once() -> None:
    groups = Groups()
    groups.use(True)
    rules = [may("tcp", "1.2.3.4", 80), may("udp", "1.2.3.4", 80)]
    told = [group("a", *rules, running="default"), group("b", *rules, running="s"), group("c", rules[0], running="t")]
    groups.update(Update(Revision(1), {(each.guid,): each for each in told}))
    reaches = {
        IPv4Address(f"10.255.1.{n}"): groups.reach(
            Container(Handle(f"h{n}"), "/n", Stage.READY, workload=Workload.APP, space=SpaceId("st"[n % 2]))
        )
        for n in range(2, 22)
    }
    made = text(egress_chains(SETTINGS, reaches)).splitlines()
    assert len([line for line in made if line.startswith("filter sb-s-")]) == 3
    assert len([line for line in made if line.startswith("filter sb-e-")]) == (1 + 1) + (1 + 2)
    assert len([line for line in made if line.startswith("filter sb-f-")]) == 20
    assert len([line for line in made if line.startswith("filter sb-from ")]) == 2


def test_a_forwarded_port_is_found_in_three_steps() -> None:
    forwards = (PortForward(61001, 8080), PortForward(53, 53, Protocol.UDP, IPv4Address("10.0.0.9")))
    one = Container(Handle("one"), "/n", Stage.READY, address=IPv4Address("10.255.1.2"), forwards=forwards)
    later = replace(one, handle=Handle("later"), address=IPv4Address("10.255.1.3"), forwards=forwards[:1])
    assert text(forwarding_chains([one], None)).splitlines() == [
        "nat sb-nat -d 10.0.0.9/32 -p udp -m udp --dport 0:255 -j sb-p-udp00",
        "nat sb-p-udp00-3 -d 10.0.0.9/32 -p udp -m udp --dport 53 -j DNAT --to-destination 10.255.1.2:53",
        "nat sb-p-udp00 -p udp -m udp --dport 48:63 -j sb-p-udp00-3",
    ]
    chains = forwarding_chains([one, later], IPv4Address("10.0.0.5"))
    assert "nat sb-nat -d 10.0.0.5/32 -p tcp -m tcp --dport 60928:61183 -j sb-p-tcpee" in text(chains)
    assert [line for line in text(chains).splitlines() if "61001" in line] == [
        "nat sb-p-tcpee-4 -d 10.0.0.5/32 -p tcp -m tcp --dport 61001 -j DNAT --to-destination 10.255.1.3:8080"
    ], "of two that want the same, the later has it"
    many = [
        replace(one, address=IPv4Address("10.255.1.4"), forwards=tuple(PortForward(p, 1) for p in range(61000, 65536)))
    ]
    assert max(map(len, forwarding_chains(many, IPv4Address("10.0.0.5")).values())) <= 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"deny_networks_always": ("10.0.0.0/33",)},
        {"metadata_endpoints": ("fd00::1",)},
        {"host_tcp_services": ("10.0.0.5",)},
        {"host_tcp_services": ("127.0.0.1:80",)},
        {"host_udp_services": ("10.0.0.5:0",)},
        {"outbound_rate": 0},
        {"outbound_burst": 100_000},
    ],
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match=next(iter(wrong))):
        EnforcerSettings(cell="c", **wrong)


def test_settings_come_as_text() -> None:
    loaded = load(
        EnforcerSettings,
        None,
        {
            "SILKBUS_CELL": "c",
            "SILKBUS_DENY_NETWORKS_ALWAYS": "172.16.1.0/12, 10.0.0.1",
            "SILKBUS_DNS_SERVERS": "169.254.0.2,8.8.8.8",
            "SILKBUS_METADATA_ENDPOINTS": "",
            "SILKBUS_INSTANCE_ADDRESS": "10.0.0.5",
        },
    )
    assert [str(network) for network in loaded.denied_always] == ["172.16.0.0/12", "10.0.0.1/32"]
    assert [str(service.address) for service in loaded.host_services] == ["169.254.0.2"] * 2
    assert loaded.instance_address == IPv4Address("10.0.0.5")
