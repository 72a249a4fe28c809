"""Settings are what was meant, or what is wrong with them is said, all of it, with its place."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bus.settings import SettingsError, load, setting


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Some:
    name: str = setting("a text")
    count: int = setting("an integer", 1)
    seconds: float = setting("a number", 1.5)
    on: bool = setting("a switch", False)
    folder: Path = setting("a folder", Path("/x"))
    file: Path | None = setting("perhaps a file", None)
    names: tuple[str, ...] = setting("texts", ())


GIVEN = [
    ("count", "42", 42),
    ("count", 42.0, 42),
    ("seconds", "0.5", 0.5),
    ("seconds", 3, 3.0),
    ("on", "TRUE", True),
    ("on", False, False),
    ("folder", "/y/z", Path("/y/z")),
    ("file", "", None),
    ("file", "/f", Path("/f")),
    ("names", "a, b,,", ("a", "b")),
    ("names", ["a"], ("a",)),
]
WRONG = [
    ("count", "1.5"),
    ("count", 1.5),
    ("count", True),
    ("count", "inf"),
    ("count", float("inf")),
    ("count", None),
    ("seconds", "nan"),
    ("seconds", float("nan")),
    ("seconds", "-inf"),
    ("seconds", ""),
    ("seconds", [1]),
    ("on", "1"),
    ("folder", ""),
    ("folder", "a\0b"),
    ("folder", 7),
    ("name", 7),
    ("names", 7),
    ("names", [7]),
]


@pytest.mark.parametrize(("name", "value", "meant"), GIVEN)
def test_what_was_meant(tmp_path: Path, name: str, value: Any, meant: Any) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"name": "n", name: value}))
    assert getattr(load(Some, file, {}), name) == meant
    if isinstance(value, str):
        assert getattr(load(Some, None, {"SILKBUS_NAME": "n", f"SILKBUS_{name.upper()}": value}), name) == meant


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, value: Any) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"name": "n", name: value}))
    with pytest.raises(SettingsError) as wrong:
        load(Some, file, {})
    assert str(wrong.value).startswith(f"{file}: {name}: must be ")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"cuont": 1, "seconds": "soon"}')
    with pytest.raises(SettingsError) as wrong:
        load(Some, file, {"SILKBUS_COUNT": "many"})
    problems = str(wrong.value).splitlines()
    assert len(problems) == 4
    for part in ("cuont: no such", "seconds: must be a number", "SILKBUS_COUNT: must be an integer", "SILKBUS_NAME"):
        assert any(part in problem for problem in problems)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "settings.json"
    file.write_bytes(content)
    for path in (file, tmp_path / "absent.json"):
        with pytest.raises(SettingsError, match=path.name):
            load(Some, path, {})


def test_a_service_with_wrong_settings_exits_2_and_says_why() -> None:
    program = "import services.enforcer.agent as agent; agent.main()"
    environment = {"SILKBUS_LOG_LEVEL": "loud"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert "cell: required" in done.stderr
    assert "Traceback" not in done.stderr
