"""Names, state and locks of labs: in folders of the test's own, no root needed."""

import json
import os
import subprocess
import sys

import pytest

from compose.lab import state
from compose.lab.processes import Process
from compose.lab.state import App, LabError, Layout, State, app_name, locked


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "RUN_ROOT", tmp_path / "run")
    monkeypatch.setattr(state, "DATA_ROOT", tmp_path / "data")


def example(tmp_path):
    process = Process("web-0", 77, 1234, tmp_path / "log")
    app = App("web-0", "web", "guid", "cell-1", "sb-x-web-0", "10.254.1.2", process, 0.02)
    return State("x", True, ["cell-1"], "nft", True, 4002, {"nats": process}, {"web-0": app})


def test_state_is_read_as_it_was_written(tmp_path):
    layout = Layout("x")
    layout.run.mkdir(parents=True)
    example(tmp_path).save(layout)
    assert State.load(layout) == example(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"services": {"nats": {}}, "apps": {}}'])
def test_state_that_cannot_be_read_is_none(content):
    layout = Layout("x")
    assert State.load(layout) is None
    layout.run.mkdir(parents=True)
    (layout.run / "state.json").write_text(content)
    assert State.load(layout) is None


@pytest.mark.parametrize("name", ["", "a-b", "a/b", "A", "x" * 17, ".."])
def test_a_lab_name_is_part_of_names_and_paths(name):
    with pytest.raises(LabError, match="cannot be a lab's name"):
        Layout(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "Web", "a/b", "cell", "centre", "underlay", "x" * 33])
def test_an_app_name_is_part_of_a_namespaces_name(name):
    with pytest.raises(LabError, match="cannot be an app's name"):
        app_name(name)


def test_a_lock_is_held_once_and_names_its_holder():
    layout = Layout("x")
    with locked(layout):
        with pytest.raises(LabError, match=str(os.getpid())), locked(layout):
            pass
        with locked(Layout("y")):
            pass
    with locked(layout):
        pass
    assert not state.RUN_ROOT.exists()


def test_a_dead_holder_does_not_lock(tmp_path):
    code = (
        "import os, pathlib, sys; from compose.lab import state; state.RUN_ROOT = pathlib.Path(sys.argv[1])\n"
        "with state.locked(state.Layout('x')): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=False, timeout=60)
    assert (tmp_path / "run/x.lock").exists()
    with locked(Layout("x")):
        pass


def test_known_are_those_with_a_folder():
    for folder in (state.RUN_ROOT / "one", state.DATA_ROOT / "two", state.DATA_ROOT / "not-one-of-ours"):
        folder.mkdir(parents=True)
    assert state.known() == ["one", "two"]
    for name in state.known():
        state.forget(Layout(name))
    assert state.known() == []
    assert not state.RUN_ROOT.exists()


def test_state_is_plain_json(tmp_path):
    layout = Layout("x")
    layout.run.mkdir(parents=True)
    example(tmp_path).save(layout)
    assert json.loads((layout.run / "state.json").read_text())["services"]["nats"]["pid"] == 77
