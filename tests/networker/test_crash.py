"""The networker killed at every named place and at random: after a restart everybody agrees again."""

import shutil

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from bus.messages import Handle
from tests.networker.cell import Cell, eventually
from tests.networker.conftest import namespace

pytestmark = pytest.mark.kernel

ADDING = ["networker.after-record", "networker.after-attach", "networker.after-admit", "networker.after-ready"]
REMOVING = ["networker.remove.after-forget", "networker.remove.after-detach"]


@pytest.mark.parametrize("failpoint", ADDING)
def test_killed_while_attaching(cell: Cell, failpoint: str) -> None:
    cell.start(failpoints=f"{failpoint}=kill")
    cell.dies_of("ADD")
    cell.start()
    eventually("the sweep is through", cell.agrees)
    assert cell.is_clean() == (failpoint != "networker.after-ready")
    assert cell.cni("ADD")[0] == 0
    assert cell.cni("DEL") == (0, {})
    assert cell.is_clean()


@pytest.mark.parametrize("failpoint", REMOVING)
def test_killed_while_removing(cell: Cell, failpoint: str) -> None:
    cell.start(failpoints=f"{failpoint}=kill")
    cell.cni("ADD")
    cell.dies_of("DEL")
    cell.start()
    eventually("the sweep goes on with it", cell.is_clean)
    assert cell.cni("DEL") == (0, {})


@pytest.mark.parametrize("failpoint", REMOVING)
def test_killed_while_sweeping(cell: Cell, failpoint: str) -> None:
    cell.start(failpoints="networker.after-admit=kill")
    cell.dies_of("ADD")
    cell.start(failpoints=f"{failpoint}=kill", expect_death=True)
    cell.start()
    eventually("the sweep is through", cell.is_clean)


def test_containers_whose_namespace_is_gone_are_swept_at_start(cell: Cell) -> None:
    cell.start()
    with namespace() as gone:
        cell.cni("ADD", "c1", netns=gone)
        cell.cni("ADD", "c2")
        cell.kill()
    cell.start()
    eventually("the sweep is through", cell.is_clean)
    assert cell.agrees()
    assert cell.records.get(Handle("c2")) is not None


def test_a_neighbour_that_is_down_is_no_reason_to_forget(cell: Cell) -> None:
    cell.start(failpoints="networker.after-attach=kill")
    cell.dies_of("ADD", "c1")
    cell.neighbours.refuse["/forget"] = (503, "starting")
    cell.start()
    eventually("the sweep tries again", lambda: cell.neighbours.calls.count(("/forget", "c1")) >= 3)
    assert cell.records.get(Handle("c1")) is not None
    assert cell.cni("ADD", "c2")[0] == 0
    cell.neighbours.refuse.clear()
    eventually("the sweep is through", cell.is_clean)
    assert cell.agrees()


HANDLES = st.sampled_from(["c1", "c2", "c3"])


class Life(RuleBasedStateMachine):
    """Any sequence of calls, crashes and absences of neighbours."""

    netns = ""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell(self.netns)
        self.cell.start()

    @rule(handle=HANDLES)
    def add(self, handle: str) -> None:
        assert self.cell.cni("ADD", handle)[0] == 0
        assert handle in self.cell.neighbours.admitted

    @rule(handle=HANDLES)
    def remove(self, handle: str) -> None:
        assert self.cell.cni("DEL", handle) == (0, {})
        assert self.cell.is_clean(handle)

    @rule(handle=HANDLES, command=st.sampled_from(["ADD", "DEL"]), failpoint=st.sampled_from(ADDING + REMOVING))
    def crash(self, handle: str, command: str, failpoint: str) -> None:
        self.cell.kill()
        self.cell.start(failpoints=f"{failpoint}=kill")
        try:
            self.cell.cni(command, handle)
        except OSError:
            pass
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore"):
                raise
        self.cell.kill()
        self.cell.start()
        if command == "DEL":
            self.remove(handle)

    @rule(
        handle=HANDLES,
        command=st.sampled_from(["ADD", "DEL"]),
        call=st.sampled_from(["/attach", "/admit", "/forget", "/detach"]),
    )
    def neighbour_away(self, handle: str, command: str, call: str) -> None:
        self.cell.neighbours.refuse[call] = (503, "starting")
        code, error = self.cell.cni(command, handle)
        assert code == 0 or error["code"] == 11
        self.cell.neighbours.refuse.clear()
        if command == "DEL":
            self.remove(handle)

    @invariant()
    def agrees(self) -> None:
        eventually("records, silk and the enforcer agree", self.cell.agrees)
        assert self.cell.neighbours.violations == []

    def teardown(self) -> None:
        self.cell.kill()
        self.cell.neighbours.stop()
        shutil.rmtree(self.cell.folder)


def test_any_life_ends_in_agreement(netns: str) -> None:
    Life.netns = netns
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=8, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
