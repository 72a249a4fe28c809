"""What foreign agents are answered from memory equals what the tables hold, whatever changes in whatever order."""

import gzip
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.messages import SecurityGroup, policy_key, tag_key
from bus.security_groups import AddressRange, EgressProtocol, EgressRule, GroupId, SpaceId, security_group_key
from bus.tables import Key
from bus.tables.publisher import Mirrored
from bus.wire import pack
from services.policy import group_view, policy_view
from services.policy.group_view import GroupView
from services.policy.policy_view import PolicyView

APPS = st.sampled_from(["a", "b", "c", 'd"', "é"])
PORTS = st.lists(st.tuples(st.sampled_from(["tcp", "udp"]), st.just(1), st.integers(1, 9)), min_size=1, max_size=3)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.builds(policy_key, APPS, APPS), st.one_of(st.none(), PORTS)),
        st.tuples(st.builds(tag_key, APPS), st.one_of(st.none(), st.integers(1, 99))),
    ),
    max_size=8,
)


def mirrored(revision: int, changes: list[tuple[Key, Any]], *, at_ms: int = 0, reloaded: bool = False) -> Mirrored:
    packed = tuple((key, None if value is None else pack(value)) for key, value in changes)
    return Mirrored("e", revision, b"%16d" % revision, packed, at_ms, reloaded)  # type: ignore[arg-type]


def expected(entries: dict[Key, Any], ids: set[str] | None) -> list[Any]:
    def end(app: str) -> dict[str, Any]:
        tag = entries.get(tag_key(app))  # type: ignore[arg-type]
        return {"id": app, **({} if tag is None else {"tag": f"{tag:04X}"})}

    return [
        {"source": end(key[2]), "destination": {**end(key[1]), "protocol": kind, "ports": {"start": low, "end": high}}}
        for key, value in entries.items()
        if key[0] == "policy" and (ids is None or ids & set(key[1:]))
        for kind, low, high in value
    ]


def as_set(policies: list[Any]) -> list[str]:
    return sorted(json.dumps(item, sort_keys=True) for item in policies)


@given(st.lists(CHANGES, max_size=8), st.sets(APPS, max_size=3))
def test_policies_are_those_of_the_table(revisions: list[list[tuple[Key, Any]]], ids: set[str]) -> None:
    view, entries, last = PolicyView(2), dict[Key, Any](), -1
    for revision, changes in enumerate(revisions, 1):
        view.update(mirrored(revision, changes))
        for key, value in changes:
            entries.pop(key, None)
            if value is not None:
                entries[key] = value
        for body, wanted in ((view.all(), None), (view.of(",".join(sorted(ids))), ids)):
            answer = json.loads(body.plain)
            assert as_set(answer["policies"]) == as_set(expected(entries, wanted))
            assert answer["total_policies"] == len(answer["policies"])
        assert view.last_updated > last
        last = view.last_updated


async def test_an_answer_is_made_and_compressed_once() -> None:
    view = PolicyView(2)
    view.update(mirrored(1, [(policy_key("b", "a"), [("tcp", 1, 1)])]))  # type: ignore[arg-type]
    assert view.all() is view.all()
    assert view.of("a") is view.of("a")
    packed = await view.all().gzipped()
    assert packed is await view.all().gzipped()
    assert gzip.decompress(packed) == view.all().plain


def test_what_is_malformed_is_left_out_and_what_was_there_with_it() -> None:
    view, key = PolicyView(2), policy_key("b", "a")  # type: ignore[arg-type]
    view.update(mirrored(1, [(key, [("tcp", 1, 1)])]))
    view.update(mirrored(2, [(key, [("icmp", 1, 1)]), (("other",), 1)]))
    assert json.loads(view.all().plain)["policies"] == []


def test_kept_answers_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_view, "MAX_CACHED", 1000)
    bodies = policy_view.Bodies()
    for number in range(10):
        bodies.keep(str(number), b"x" * 300)
    assert [bodies.get(str(number)) is not None for number in range(10)] == [False] * 7 + [True] * 3


def test_last_updated_is_that_of_the_database_and_never_falls() -> None:
    one, other = PolicyView(2), PolicyView(2)
    one.update(mirrored(4, [], at_ms=1000, reloaded=True))
    one.update(mirrored(5, [], at_ms=2000))
    other.update(mirrored(5, [], at_ms=2000, reloaded=True))
    assert one.last_updated == other.last_updated == 2000 * 10**6 + 10
    # A clock that goes back, as the publisher tells it, does not count; the revision does.
    one.update(mirrored(6, [], at_ms=2000))
    assert one.last_updated == 2000 * 10**6 + 12
    before = time.time_ns()
    one.update(mirrored(4, [], at_ms=1000, reloaded=True))
    assert one.last_updated >= before


def group(guid: str, *rules: EgressRule, everywhere: bool = False, spaces: str = "") -> SecurityGroup:
    bound = frozenset(SpaceId(space) for space in spaces.split())
    return SecurityGroup(GroupId(guid), f"name of {guid}", rules, running_default=everywhere, staging_spaces=bound)


def groups(*given: SecurityGroup) -> GroupView:
    view = GroupView()
    view.update(mirrored(1, [(security_group_key(item.guid), item.encode()) for item in given]))
    return view


def guids(view: GroupView, spaces: str = "", start: int = 0, limit: int = 0) -> tuple[set[str], int]:
    answer = json.loads(view.page(spaces, start, limit).plain)
    return {item["guid"] for item in answer["security_groups"]}, answer["next"]


def test_groups_are_those_that_are_everywhere_and_those_of_the_spaces() -> None:
    view = groups(group("g1", everywhere=True), group("g2", spaces="s1 s2"), group("g3", spaces="s3"))
    assert guids(view) == ({"g1"}, 0)
    assert guids(view, "s1") == guids(view, "s2,other") == ({"g1", "g2"}, 0)
    assert guids(view, "s1,s3") == ({"g1", "g2", "g3"}, 0)
    view.update(mirrored(2, [(("g1",), None), (("g2",), {"name": 7})]))
    assert guids(view, "s1,s3") == ({"g3"}, 0)


def test_pages_follow_each_other_though_groups_come_and_go() -> None:
    names = [f"g{number}" for number in range(20)]
    view = groups(*(group(name, everywhere=True) for name in names))
    seen, start = set[str](), 0
    while True:
        page, start = guids(view, start=start, limit=3)
        assert not page & seen
        seen |= page
        if not start:
            break
        gone = next(name for name in names if name in seen)
        names.remove(gone)
        view.update(mirrored(2, [((gone,), None)]))
    assert seen == {f"g{number}" for number in range(20)}
    assert 0 < group_view.number("g1") < 2**63


def test_rules_are_as_agents_read_them() -> None:
    some = [
        EgressRule(
            EgressProtocol.TCP,
            (AddressRange.parse("10.0.0.0/24"), AddressRange.parse("10.0.1.1-10.0.1.9")),
            ((80, 80), (443, 500)),
            log=True,
            description='say "é/<"',
        ),
        EgressRule(EgressProtocol.ICMP, (AddressRange.parse("8.8.8.8"),)),
        EgressRule(EgressProtocol.ICMP, (AddressRange.parse("8.8.8.8"),), icmp_type=0, icmp_code=3),
        EgressRule(EgressProtocol.ALL, (AddressRange.parse("0.0.0.0/0"),)),
    ]
    plain = groups(group("g", *some, everywhere=True)).page("", 0, 0).plain
    (item,) = json.loads(plain)["security_groups"]
    assert list(item) == [
        "guid",
        "name",
        "rules",
        "staging_default",
        "running_default",
        "staging_space_guids",
        "running_space_guids",
    ]
    first = {"protocol": "tcp", "destination": "10.0.0.0/24", "ports": "80,443-500", "type": 0, "code": 0}
    more = {"description": 'say "é/<"', "log": True}
    rules = json.loads(item["rules"])
    assert rules[0] == {**first, **more}
    assert list(rules[0]) == ["protocol", "destination", "ports", "type", "code", "description", "log"]
    assert rules[1]["destination"] == "10.0.1.1-10.0.1.9"
    assert [(rule["type"], rule["code"]) for rule in rules[2:]] == [(-1, -1), (0, 3), (0, 0)]
    # A Go agent takes the text out of its quotes as a Go string, which knows no \/ and no halves of surrogates.
    assert b"\\/" not in plain
    assert "é".encode() in plain
