"""Questions about flows and their answers: what is encoded decodes to the same, and nothing malformed gets through."""

from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.decode import Fields, Malformed
from bus.explaining import MAX_TARGETS, CellAnswer, Instance, Outcome, Probe, Question, Verdict
from bus.messages import AppId, CellName, Handle, Protocol, Revision
from bus.wire import decode, encode

QUESTION = Question("1f", AppId("a"), AppId("b"), Protocol.UDP, 53, (IPv4Address("10.255.1.2"),))
INSTANCE = Instance(
    Handle("h"),
    IPv4Address("10.255.1.2"),
    Verdict.REFUSED,
    "no policy",
    "sb-to",
    "-j sb-deny-in",
    False,
    ("filter sb-to: the kernel has no such chain",),
    (Probe(IPv4Address("10.255.1.3"), Outcome.TIMEOUT, 2000.0, "words"),),
)
ANSWER = CellAnswer("1f", CellName("c1"), Revision(7), (INSTANCE,), (INSTANCE,), "why")
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


def over_the_bus(message: dict[str, Any]) -> Fields:
    return decode(encode(message), "test")


def test_what_is_sent_is_what_is_heard() -> None:
    assert Question.decode(over_the_bus(QUESTION.encode())) == QUESTION
    assert CellAnswer.decode("c1", over_the_bus(ANSWER.encode())) == ANSWER


@given(st.sampled_from(sorted(QUESTION.encode())), anything)
def test_no_field_of_a_question_breaks_who_hears_it(name: str, value: Any) -> None:
    with suppress(Malformed):
        Question.decode(over_the_bus({**QUESTION.encode(), name: value}))


@given(st.sampled_from(sorted(ANSWER.encode())), st.sampled_from(["", *sorted(INSTANCE.encode())]), anything)
def test_no_field_of_an_answer_breaks_who_hears_it(name: str, inner: str, value: Any) -> None:
    body = ANSWER.encode()
    if inner:
        body["sources"] = [{**INSTANCE.encode(), inner: value}]
    else:
        body[name] = value
    with suppress(Malformed):
        CellAnswer.decode("c1", over_the_bus(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "icmp"}, "protocol"),
        ({"port": 0}, "port"),
        ({"targets": ["10.255.1.2"] * (MAX_TARGETS + 1)}, "targets"),
        ({"targets": ["x"]}, "targets"),
        ({"source": ""}, "source"),
        ({"id": None}, "id"),
    ],
)
def test_a_question_that_cannot_be_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        Question.decode(over_the_bus({**QUESTION.encode(), **change}))
