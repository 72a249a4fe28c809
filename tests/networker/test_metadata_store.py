"""The store beside the containers: there with the answer's container, gone with it, right again after a crash."""

import fcntl
from pathlib import Path

import pytest

from bus.messages import Handle
from tests.networker.cell import Cell, eventually
from tests.networker.store_reader import StoreReader

pytestmark = pytest.mark.kernel

METADATA = {"app_id": "app", "space_id": "space", "org_id": "org", "policy_group_id": "app"}


@pytest.fixture
def path(cell: Cell) -> Path:
    return cell.folder / "container-metadata" / "store.json"


def test_containers_come_and_go(cell: Cell, path: Path) -> None:
    cell.start(metadata_store=path)
    reader = StoreReader(path)
    eventually("the store is there", lambda: Path(f"{path}_version").exists())
    cell.cni("ADD", "c1", config={"metadata": METADATA})
    cell.cni("ADD", "c2")
    first = {"handle": "c1", "ip": cell.neighbours.attached["c1"], "metadata": METADATA}
    second = {"handle": "c2", "ip": cell.neighbours.attached["c2"], "metadata": None}
    eventually("both are in the store", lambda: reader.read() == {"c1": first, "c2": second})

    cell.cni("DEL", "c2")
    eventually("one is gone", lambda: reader.read() == {"c1": first})

    # As long as a container is not quite gone, a drain must see it.
    cell.neighbours.refuse["/detach"] = (500, "no")
    assert cell.cni("DEL", "c1")[0] != 0
    assert reader.read() == {"c1": first}
    cell.neighbours.refuse.clear()
    eventually("the other is, too", lambda: reader.read() == {})


def test_the_last_removal_before_the_end_is_in_it(cell: Cell, path: Path) -> None:
    cell.start(metadata_store=path)
    cell.cni("ADD")
    cell.cni("DEL")
    assert cell.stop() == 0
    assert StoreReader(path).read() == {}


@pytest.mark.parametrize("failpoint", ["networker.after-ready", "networker.remove.after-detach"])
def test_killed_between_record_and_store(cell: Cell, path: Path, failpoint: str) -> None:
    cell.start(metadata_store=path, failpoints=f"{failpoint}=kill")
    if failpoint == "networker.after-ready":
        cell.dies_of("ADD")
    else:
        cell.cni("ADD")
        cell.dies_of("DEL")
    # Whatever the crash left of it, and another one's writing without a new version, which a reader cannot see.
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"foreign":{"handle":"foreign","ip":"10.255.30.77","metadata":null}}')
    reader = StoreReader(path)
    assert "foreign" in reader.read()
    cell.start(metadata_store=path)
    expected = ["c1"] if failpoint == "networker.after-ready" else []
    eventually("the store says what is", lambda: list(reader.read()) == expected)
    assert (cell.records.get(Handle("c1")) is not None) == bool(expected)


def test_a_store_that_cannot_be_written_fails_no_container(cell: Cell, path: Path) -> None:
    path.parent.write_text("no folder")
    cell.start(metadata_store=path)
    assert cell.cni("ADD")[0] == 0
    eventually("it is said", lambda: cell.get("/readyz").status_code == 503)
    assert f"{path} is not in step with the containers" in cell.get("/readyz").text
    assert "metadata store not written" in (cell.folder / "networker.log").read_text()
    path.parent.unlink()
    eventually("it is written once it can be", lambda: path.exists() and list(StoreReader(path).read()) == ["c1"])
    eventually("that is said, too", lambda: cell.get("/readyz").status_code == 200)


def test_a_lock_that_another_process_keeps_holds_up_no_container(cell: Cell, path: Path) -> None:
    cell.start(metadata_store=path)
    eventually("the store is there", lambda: Path(f"{path}_version").exists())
    with Path(f"{path}_lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for handle in ("c1", "c2", "c3"):
            assert cell.cni("ADD", handle)[0] == 0
        assert cell.cni("DEL", "c2")[0] == 0
        eventually("it is said", lambda: "another process keeps its lock" in cell.get("/readyz").text)
    eventually("then it is in step", lambda: list(StoreReader(path).read()) == ["c1", "c3"])


def test_off_by_default(cell: Cell, path: Path) -> None:
    cell.start()
    cell.cni("ADD")
    assert cell.stop() == 0
    assert not path.parent.exists()
