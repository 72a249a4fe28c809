"""How long a lease may be used, and what is remembered of it."""

import json
from pathlib import Path

import pytest

from services.silk import tenure
from services.silk.tenure import Tenure, boot_clock, load, save
from tests.silk.conftest import lease_of

LEASE = lease_of(7)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "silk" / "lease.json"


def test_it_ends_a_margin_early() -> None:
    week = 7 * 86400
    assert Tenure(LEASE, 1000.0, week).fence_at == 1000 + week - 60
    assert Tenure(LEASE, 1000.0, 10).fence_at == 1009


def test_it_is_renewed_often_enough_to_miss_some() -> None:
    assert Tenure(LEASE, 0, 7 * 86400).renew_interval == 30
    assert Tenure(LEASE, 0, 8).renew_interval == 2


def test_it_holds_until_then() -> None:
    assert Tenure(LEASE, boot_clock(), 100).holds
    assert not Tenure(LEASE, boot_clock() - 95, 100).holds


def test_it_is_remembered(file: Path) -> None:
    assert load(file) is None
    remembered = Tenure(LEASE, 12.5, 604800)
    save(remembered, file)
    assert load(file) == remembered


def test_another_boot_says_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Tenure(LEASE, 12.5, 604800), file)
    monkeypatch.setattr(tenure, "boot_id", lambda: "another")
    assert load(file) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"boot_id": 3}', b"\xff\xfe".decode("latin-1")])
def test_what_is_not_understood_is_not_used(file: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert load(file) is None
    assert "saved lease is not used" in caplog.text


def test_a_damaged_lease_is_not_used(file: Path) -> None:
    save(Tenure(LEASE, 12.5, 604800), file)
    content = json.loads(file.read_text())
    content["lease"]["subnet"] = "10.255.7.1/24"
    file.write_text(json.dumps(content))
    assert load(file) is None
