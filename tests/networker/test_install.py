"""`silkbus install-cni`."""

import ast
import json
import stat
from pathlib import Path

import pytest

from services.networker import install


def test_installs_one_executable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "opt" / "cni" / "bin"
    arguments = [str(folder), "--run-dir", "/run/cell 'one'", "--timeout", "7.5", "--python", "/usr/bin/python3"]
    assert install.main(arguments) == 0
    assert [path.name for path in folder.iterdir()] == ["silkbus-cni"]
    plugin = folder / "silkbus-cni"
    assert stat.S_IMODE(plugin.stat().st_mode) == 0o755
    text = plugin.read_text()
    assert text.splitlines()[0] == "#!/usr/bin/python3 -IS"
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    assert constants["SOCKET"] == "/run/cell 'one'/networker/networker.sock"
    assert constants["TIMEOUT"] == 7.5
    assert json.loads(capsys.readouterr().out)["plugins"] == [{"type": "silkbus-cni"}]


def test_only_modules_in_c(tmp_path: Path) -> None:
    """Each module in Python that the plugin imports costs every container's start milliseconds."""
    install.main([str(tmp_path)])
    tree = ast.parse((tmp_path / "silkbus-cni").read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"_json", "_signal", "_socket", "posix"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_garden_s_likewise(tmp_path: Path) -> None:
    assert install.garden_main([str(tmp_path), "--run-dir", "/run/cell", "--timeout", "7.5"]) == 0
    plugin = tmp_path / "silkbus-garden"
    assert stat.S_IMODE(plugin.stat().st_mode) == 0o755
    tree = ast.parse(plugin.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"_json", "_signal", "_socket", "posix", "sys"}
    assert "SOCKET = '/run/cell/networker/networker.sock'\nTIMEOUT = 7.5\n" in plugin.read_text()
    assert install.garden_main([str(tmp_path / "silkbus-garden" / "x")]) == 1


def test_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "silkbus-cni").write_text("old")
    with (tmp_path / "silkbus-cni").open() as running:
        assert install.main([str(tmp_path)]) == 0
        assert running.read() == "old"
    assert (tmp_path / "silkbus-cni").read_text().startswith("#!")


def test_writes_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conflist = tmp_path / "net.d" / "10-silkbus.conflist"
    assert install.main([str(tmp_path / "bin"), "--conflist", str(conflist)]) == 0
    assert json.loads(conflist.read_text())["name"] == "silkbus"
    assert capsys.readouterr().out == ""


def test_says_what_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert install.main([str(tmp_path / "file" / "bin")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_relative_run_dir_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    install.main([str(tmp_path), "--run-dir", "run"])
    assert f"{Path.cwd()}/run/networker" in (tmp_path / "silkbus-cni").read_text()
