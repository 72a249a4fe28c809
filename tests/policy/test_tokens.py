"""The token file: who is let in, and what happens when the file changes or is wrong."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bus.decode import Malformed
from services.policy.identity import Identity
from services.policy.tokens import TokenFile


def write(path: Path, *tokens: Any) -> None:
    """As an operator should: a new file renamed over the old one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"tokens": list(tokens)}))
    temporary.rename(path)


async def test_a_token_or_its_digest_stands_for_a_user(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    write(
        path,
        {"token": "open", "user": "ann", "scopes": ["network.admin"]},
        {"sha256": hashlib.sha256(b"hidden").hexdigest(), "user": "bob", "scopes": []},
    )
    tokens = TokenFile(path)
    assert await tokens.verify("open") == Identity("ann", "ann", ("network.admin",))
    assert await tokens.verify("hidden") == Identity("bob", "bob", ())
    for wrong in ("", "ope", "open ", "\udc80"):
        assert await tokens.verify(wrong) is None


async def test_a_changed_file_counts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    write(path, {"token": "one", "user": "ann", "scopes": []})
    tokens = TokenFile(path)
    write(path, {"token": "two", "user": "ann", "scopes": []})
    assert await tokens.verify("one") is None
    assert await tokens.verify("two") is not None


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("{")])
async def test_without_a_usable_file_nobody_is_let_in_until_it_is_back(tmp_path: Path, harm: Any) -> None:
    path = tmp_path / "tokens"
    write(path, {"token": "one", "user": "ann", "scopes": []})
    tokens = TokenFile(path)
    harm(path)
    assert await tokens.verify("one") is None
    write(path, {"token": "one", "user": "ann", "scopes": []})
    assert await tokens.verify("one") is not None


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"user": "a", "scopes": []}, "tokens[0]: needs a token, or its digest as sha256"),
        ({"token": "t", "scopes": []}, "tokens[0]: user: missing"),
        ({"token": "t", "user": "a", "scopes": [1]}, "tokens[0]: scopes: must be a list of texts"),
        ({"sha256": "abc", "user": "a", "scopes": []}, "tokens[0]: sha256: must be 64 hexadecimal digits"),
    ],
)
def test_a_wrong_file_is_reported_with_its_place(tmp_path: Path, item: Any, text: str) -> None:
    path = tmp_path / "tokens"
    write(path, item)
    with pytest.raises(Malformed) as error:
        TokenFile(path)
    assert str(error.value) == f"token file {path}: {text}"


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="cannot be read: No such file"):
        TokenFile(tmp_path / "nothing")
