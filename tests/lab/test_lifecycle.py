"""What a lab asks of the machine and of who calls it, said before anything is made."""

import pytest

from compose.lab import lifecycle
from compose.lab.lab import Lab
from compose.lab.services import names, service
from compose.lab.state import LabError, Layout, State

STATE = State("x", True, ["cell-1", "cell-2"])


def test_missing_programs_are_named_with_their_packages(monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(lifecycle, "SYSTEM_FOLDERS", ())
    wanted = r"missing: ip, iptables-restore, iptables-save, ipset, sysctl; .*apt-get install"
    with pytest.raises(LabError, match=wanted):
        lifecycle.requirements()


def test_root_is_needed(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LabError, match="needs root"):
        lifecycle.requirements()


@pytest.mark.parametrize("cells", [0, -1, 101])
def test_the_number_of_cells_is_bounded(cells, monkeypatch):
    monkeypatch.setattr(lifecycle, "requirements", lambda: None)
    with pytest.raises(LabError, match=f"1 to 100 cells, not {cells}"), lifecycle.made("x", cells):
        pass


def test_every_service_is_defined_and_others_are_refused():
    layout = Layout("x")
    assert len(names(STATE)) == 9
    for name in names(STATE):
        assert service(name, layout, STATE).namespace.startswith("sb-x-")
    with pytest.raises(LabError, match=r"no service 'cell-3/enforcer' in lab x; there are: nats, .*cell-2/networker"):
        service("cell-3/enforcer", layout, STATE)


def test_each_cell_has_folders_and_a_lock_of_its_own():
    layout = Layout("x")
    first, second = (service(f"cell-{number}/enforcer", layout, STATE).environment for number in (1, 2))
    for key in ("SILKBUS_CELL", "SILKBUS_RUN_DIR", "SILKBUS_STATE_DIR", "XTABLES_LOCKFILE"):
        assert first[key] != second[key]


def test_an_unknown_container_or_cell_is_named_with_those_there():
    lab = Lab(Layout("x"), STATE)
    with pytest.raises(LabError, match="no container 'web-0' in lab x; there are: none yet"):
        lab.container("web-0")
    with pytest.raises(LabError, match="no cell 'cell-9' in lab x; there are: cell-1, cell-2"):
        lab.run_app("web", ["cell-9"])


def test_an_app_has_the_same_guid_everywhere():
    assert (
        Lab(Layout("x"), STATE).guid("web") == Lab(Layout("y"), STATE).guid("web") != Lab(Layout("x"), STATE).guid("db")
    )
