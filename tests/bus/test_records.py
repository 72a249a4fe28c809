"""One container's record never hides another's, whatever lies in the folder."""

from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from bus.decode import Malformed
from bus.messages import Container, Handle, Stage
from bus.records import MAX_HANDLE, Records, file_name

GOOD = Container(Handle("good"), "/run/netns/good", Stage.READY)


@given(st.text(min_size=1, max_size=30))
@settings(deadline=None)
def test_a_handle_names_one_file_in_the_folder_or_is_refused(text: str) -> None:
    try:
        name = file_name(Handle(text))
    except Malformed:
        return
    assert Path(name).name == name
    assert not name.startswith(".")
    assert "\0" not in name


@given(st.sets(st.text(alphabet="ab./%\\ é", min_size=1, max_size=5), min_size=2, max_size=2))
def test_two_handles_have_two_files(handles: set[str]) -> None:
    one, other = (file_name(Handle(handle)) for handle in handles)
    assert one != other


@pytest.mark.parametrize("handle", ["", "x" * (MAX_HANDLE + 1), "é" * MAX_HANDLE, "\ud800"])
def test_odd_handles_are_refused(handle: str) -> None:
    with pytest.raises(Malformed, match=r"^handle: "):
        file_name(Handle(handle))


def test_what_is_put_is_there_until_it_is_deleted(tmp_path: Path) -> None:
    records = Records(tmp_path / "containers")
    assert records.all() == []
    odd = replace(GOOD, handle=Handle("../a b/.json"))
    records.put(GOOD)
    records.put(odd)
    records.put(replace(GOOD, netns="/run/netns/other"))
    assert {container.handle for container in records.all()} == {"good", "../a b/.json"}
    assert records.get(Handle("good")) == replace(GOOD, netns="/run/netns/other")
    records.delete(odd.handle)
    records.delete(odd.handle)
    assert records.get(odd.handle) is None
    assert len(list(records.folder.iterdir())) == 1


def test_unreadable_records_do_not_hide_the_others(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.put(GOOD)
    (tmp_path / "empty.json").touch()
    (tmp_path / "cut.json").write_text('{"handle": "cut"')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "copy.json").write_bytes((tmp_path / "good.json").read_bytes())
    (tmp_path / "left.tmp").write_text("half")
    assert records.all() == [GOOD]
    with pytest.raises(Malformed, match=r"copy\.json"):
        records.get(Handle("copy"))


def test_a_full_disk_leaves_the_old_record(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.put(GOOD)
    (tmp_path / "good.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        records.put(replace(GOOD, netns="/run/netns/other"))
    assert records.all() == [GOOD]
    assert list(tmp_path.iterdir()) == [tmp_path / "good.json"]
