"""The original's metadata store as its readers see it: format, lock, version, owner."""

import fcntl
import json
import os
import stat
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.decode import Malformed
from bus.messages import Container, Handle, Stage
from services.networker import metadata_store
from services.networker.record import OURS
from services.networker.store_file import Owner, StoreFile, entry
from tests.networker.store_reader import StoreReader

A, B = Handle("a"), Handle("b")
ENTRY = {"handle": "a", "ip": "10.255.30.2", "metadata": {"space_id": "s", "app_id": "x<&>"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "container-metadata" / "store.json"


def test_to_the_byte(path: Path) -> None:
    assert StoreFile(path, None).keep({A: ENTRY})
    text = r'{"a":{"handle":"a","ip":"10.255.30.2","metadata":{"app_id":"x\u003c\u0026\u003e","space_id":"s"}}}'
    assert path.read_bytes() == text.encode() + b"\n"
    assert Path(f"{path}_version").read_bytes() == b"2"
    assert Path(f"{path}_lock").read_bytes() == b""
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()] == [0o600] * 3


def test_what_is_so_already_is_not_written(path: Path) -> None:
    file = StoreFile(path, None)
    assert file.keep({A: ENTRY})
    assert not file.keep({A: ENTRY})
    assert Path(f"{path}_version").read_bytes() == b"2"
    assert file.keep({A: ENTRY}, anew=True)
    assert Path(f"{path}_version").read_bytes() == b"3"


@pytest.mark.parametrize(("found", "then"), [(b"", b"2"), (b"41", b"42"), (b"41\n", b"42"), (b"banana", b"2")])
def test_the_version_goes_on_from_what_is_found(path: Path, found: bytes, then: bytes) -> None:
    path.parent.mkdir()
    Path(f"{path}_version").write_bytes(found)
    StoreFile(path, None).keep({})
    assert Path(f"{path}_version").read_bytes() == then


def test_the_same_file_is_written_and_foreign_entries_go(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"foreign":{"handle":"foreign","ip":"10.255.30.9","metadata":null}}' + " " * 1000)
    inode = path.stat().st_ino
    StoreFile(path, None).keep({A: ENTRY})
    assert path.stat().st_ino == inode
    assert json.loads(path.read_text()) == {"a": ENTRY}


def test_another_lock_is_not_waited_for(path: Path) -> None:
    file = StoreFile(path, None)
    file.keep({})
    with Path(f"{path}_lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            file.keep({A: ENTRY})
        assert json.loads(path.read_text()) == {}
    assert file.keep({A: ENTRY})


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        StoreFile(path, Owner("root", "root")).keep({A: ENTRY})
    assert victim.read_text() == "precious"


@pytest.mark.kernel
def test_the_owner(path: Path) -> None:
    StoreFile(path, metadata_store.owner("nobody", "daemon")).keep({})
    assert {(file.owner(), file.group()) for file in (path.parent, *path.parent.iterdir())} == {("nobody", "daemon")}


def test_owners_that_cannot_be(path: Path) -> None:
    assert metadata_store.owner(None, None) is None
    with pytest.raises(Malformed, match="both or neither"):
        metadata_store.owner("root", None)
    with pytest.raises(OSError, match="no-such-user"):
        StoreFile(path, metadata_store.owner("no-such-user", "root")).keep({})


def test_metadata_is_the_runtimes_own() -> None:
    def container(**metadata: Any) -> Container:
        address = IPv4Address("10.255.30.2")
        return Container(A, "/netns", Stage.READY, None, address, None, metadata={OURS: {"ifname": "eth0"}, **metadata})

    assert entry(container(app_id="x")) == {"handle": "a", "ip": "10.255.30.2", "metadata": {"app_id": "x"}}
    assert entry(container())["metadata"] is None


metadata = st.dictionaries(st.text(), st.text() | st.integers() | st.none())
stores = st.dictionaries(st.text(min_size=1), metadata, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(stores, max_size=4))
def test_a_reader_sees_each_write_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    path = tmp_path_factory.mktemp("store") / "store.json"
    file, reader = StoreFile(path, None), StoreReader(path)
    for step in steps:
        entries = {Handle(name): {"handle": name, "ip": "10.0.0.1", "metadata": each} for name, each in step.items()}
        file.keep(entries)
        assert reader.read() == entries


def test_half_a_surrogate_is_what_go_reads_of_it(path: Path) -> None:
    StoreFile(path, None).keep({A: {**ENTRY, "metadata": {"x": "\ud800"}}})
    assert StoreReader(path).read()["a"]["metadata"] == {"x": "\ufffd"}


def test_a_write_cut_short_leaves_what_a_reader_can_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the data and before the cut behind it: the first value in the file is the new store."""
    file = StoreFile(path, None)
    file.keep({A: ENTRY, B: {**ENTRY, "handle": "b"}})
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", _dies)
        with pytest.raises(_Death):
            file.keep({A: ENTRY})
    assert StoreReader(path).read() == {"a": ENTRY}
    assert file.keep({A: ENTRY})
    assert json.loads(path.read_text()) == {"a": ENTRY}


class _Death(Exception):
    pass


def _dies(*_: object) -> None:
    raise _Death
