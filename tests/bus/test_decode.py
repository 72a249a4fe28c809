"""What comes from outside is taken as what it must be, or refused by name."""

import json
from typing import Any

import pytest

from bus.decode import Fields, Malformed


@pytest.mark.parametrize("text", ['"a\\u0000b"', '"\\ud800"', '"\\udc00x"', '""', "7", "null", "[]"])
def test_text_that_could_not_be_kept_or_sent_is_refused(text: str) -> None:
    with pytest.raises(Malformed, match=r"^here: name: "):
        Fields({"name": json.loads(text)}, "here").text("name")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "true", '"1"', "null"])
def test_what_is_not_a_finite_number_is_refused(number: str) -> None:
    with pytest.raises(Malformed, match=r"^here: age: "):
        Fields({"age": json.loads(number)}, "here").number("age")


@pytest.mark.parametrize(("value", "high"), [(-1, 9), (10, 9), (1.0, 9), (True, 9), (2**63, 2**63 - 1)])
def test_integers_are_integers_within_their_limits(value: Any, high: int) -> None:
    with pytest.raises(Malformed, match=r"^here: part: "):
        Fields({"part": value}, "here").integer("part", high=high)


def test_what_is_well_formed_is_taken() -> None:
    fields = Fields({"name": "naïve 🎉", "age": 3, "part": 9, "gone": None}, "here")
    assert (fields.text("name"), fields.number("age"), fields.integer("part", high=9)) == ("naïve 🎉", 3.0, 9)
    assert "gone" not in fields
    assert fields.optional_text("gone") is None
