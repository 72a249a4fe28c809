"""Many calls at once, contrary calls and services that die meanwhile, on the real services of a cell.

However a call ends, nothing may be left of a container that was removed, and one that was answered must be there.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bus.records import Records
from compose.lab import containers, namespaces
from compose.lab.containers import CniError
from compose.lab.probe import connect, target

pytestmark = pytest.mark.system

CELL = "cell-1"
PATIENCE = 60.0
MANY = 100
TRY_AGAIN_LATER = 11


class Cell:
    """The plugin of one cell, and what the cell's parts know of containers."""

    def __init__(self, lab):
        self.lab = lab
        self.records = Records(lab.layout.cell_state(CELL) / "containers")

    def call(self, command, handle):
        """The address that ADD answers, or the code of an error."""
        try:
            result = containers.call_plugin(self.lab.layout, command, handle, self.lab.guid("api"), CELL)
        except CniError as error:
            return error.code
        return result["ips"][0]["address"] if command == "ADD" else None

    def known(self):
        """What the records say, handle -> address, and the addresses of the links, which are named for them."""
        records = {record.handle: str(record.address) for record in self.records.all() if record.stage == "ready"}
        shown = namespaces.run(["ip", "-n", self.lab.layout.namespace(CELL), "-json", "link", "show"])
        names = [link["ifname"] for link in json.loads(shown) if link["ifname"].startswith("s-")]
        octets = [[str(int(name[place : place + 3])) for place in (2, 5, 8, 11)] for name in names]
        return records, {".".join(each) for each in octets}

    def settles(self, handles):
        """Whether in the end just these containers are there, beside the lab's own, in the eyes of all."""
        wanted = {*handles, *(name for name, app in self.lab.state.apps.items() if app.cell == CELL)}
        deadline = time.monotonic() + PATIENCE
        while True:
            records, links = self.known()
            files = {record.handle for record in self.records.all()}
            enforced = self.lab.enforcer_state(CELL)["containers"]
            if files == set(records) == wanted and set(records.values()) == links and enforced == len(wanted):
                return True
            if time.monotonic() > deadline:
                print({"records": records, "links": links, "files": files, "enforced": enforced, "wanted": wanted})
                return False
            time.sleep(0.1)


@pytest.fixture
def cell(lab):
    return Cell(lab)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2 * MANY) as pool:
        yield pool


@pytest.fixture
def made(lab):
    """Makes namespaces for containers of these names, which are their handles."""
    names = []

    def make(prefix, count):
        handles = [f"{prefix}-{number}" for number in range(count)]
        for handle in handles:
            namespaces.create(lab.layout.namespace(handle))
            names.append(lab.layout.namespace(handle))
        return handles

    yield make
    for name in names:
        namespaces.delete(name)


def test_many_at_once(cell, pool, made):
    handles = made("many", MANY)
    addresses = list(pool.map(lambda handle: cell.call("ADD", handle), handles))
    assert all(isinstance(address, str) for address in addresses)
    assert len(set(addresses)) == MANY
    assert cell.settles(handles)
    assert set(pool.map(lambda handle: cell.call("DEL", handle), handles)) == {None}
    assert cell.settles([])


def test_added_twice_at_once(cell, pool, made):
    handles = made("twice", 10)
    addresses = list(pool.map(lambda handle: cell.call("ADD", handle), handles * 3))
    assert addresses[:10] == addresses[10:20] == addresses[20:]
    assert cell.settles(handles)
    for handle in handles:
        cell.call("DEL", handle)
    assert cell.settles([])


def test_removed_while_being_added(cell, pool, made):
    """Whichever comes first: a removal after the answer of ADD leaves nothing, and an answer without one is true."""
    handles = made("brief", 20)
    added = {handle: pool.submit(cell.call, "ADD", handle) for handle in handles}
    removed = []
    for number, handle in enumerate(handles):
        time.sleep(0.002 * number)
        removed.append(pool.submit(cell.call, "DEL", handle))
    assert all(isinstance(future.result(), str) for future in added.values())
    assert [future.result() for future in removed] == [None] * len(handles)
    records, links = cell.known()
    assert set(records.values()) == links
    for handle in handles:
        assert cell.call("DEL", handle) is None
    assert cell.settles([])


@pytest.mark.parametrize("part", ["networker", "silk-worker", "enforcer"])
def test_killed_in_between(lab, cell, pool, made, part):
    """What was answered is there, what was refused is not, once the part is back and the sweep has been."""
    handles = made(part, 20)
    calls = {handle: pool.submit(cell.call, "ADD", handle) for handle in handles}
    while not any(future.done() for future in calls.values()):
        time.sleep(0.01)
    lab.kill(f"{CELL}/{part}")
    lab.start(f"{CELL}/{part}")
    answers = {handle: future.result() for handle, future in calls.items()}
    there = {handle: answer for handle, answer in answers.items() if isinstance(answer, str)}
    assert there
    assert {answer for answer in answers.values() if not isinstance(answer, str)} <= {TRY_AGAIN_LATER}
    if part != "networker":  # whose death leaves nobody to answer for a container that is there
        assert cell.settles(there)
    again = dict(zip(handles, pool.map(lambda handle: cell.call("ADD", handle), handles), strict=True))
    assert all(isinstance(address, str) for address in again.values())
    assert there.items() <= again.items()
    assert cell.settles(handles)
    source = lab.layout.namespace(handles[0])
    verdict = connect(source, [target(lab.container("web-1").address, 8080)])[0].verdict
    assert verdict == "refused"
    assert set(pool.map(lambda handle: cell.call("DEL", handle), handles)) == {None}
    assert cell.settles([])
