"""The matrix: what it calls wrong, and how it looks."""

from pathlib import Path

import pytest

from compose.lab.matrix import Allowed, Matrix, render
from compose.lab.probe import Outcome
from compose.lab.processes import Process
from compose.lab.state import App
from compose.lab.terminal import Terminal

PROCESS = Process("app", 1, 1, Path("log"))
WEB = App("web-0", "web", "g-web", "cell-1", "ns-web", "10.254.1.2", PROCESS, 0.0)
DB = App("db-0", "db", "g-db", "cell-2", "ns-db", "10.254.2.2", PROCESS, 0.0)
ALLOWED = [Allowed("web", "db", 8080, 8080)]


def seen(**outcomes):
    """A matrix of two containers where only the outcomes given, as web_db_8080=…, are not refusals."""
    refused = Outcome("refused", error="ECONNREFUSED")
    keys = [(a, b, port) for a, b in (("web-0", "db-0"), ("db-0", "web-0")) for port in (8080, 9090)]
    names = {f"{a[:-2]}_{b[:-2]}_{port}": (a, b, port) for a, b, port in keys}
    return Matrix(
        [WEB, DB], (8080, 9090), dict.fromkeys(keys, refused) | {names[name]: value for name, value in outcomes.items()}
    )


def test_as_expected():
    assert seen().wrong([]) == []
    assert seen(web_db_8080=Outcome("accepted", "db-0")).wrong(ALLOWED) == []


@pytest.mark.parametrize(
    ("matrix", "allowed", "problem"),
    [
        (seen(web_db_9090=Outcome("accepted", "db-0")), [], "web-0 -> db-0 port 9090: is open, though no policy"),
        (seen(db_web_8080=Outcome("accepted", "web-0")), [], "db-0 -> web-0 port 8080: is open, though no policy"),
        (seen(), ALLOWED, "web-0 -> db-0 port 8080: was refused ECONNREFUSED, though a policy allows it"),
        (seen(web_db_8080=Outcome("timed out")), ALLOWED, "port 8080: was timed out, though a policy allows it"),
        (seen(web_db_8080=Outcome("accepted", "web-0")), ALLOWED, "port 8080: web-0 answered"),
    ],
)
def test_not_as_expected(matrix, allowed, problem):
    (said,) = matrix.wrong(allowed)
    assert problem in said


def test_a_range_allows_each_of_its_ports():
    both = seen(web_db_8080=Outcome("accepted", "db-0"), web_db_9090=Outcome("accepted", "db-0"))
    assert both.wrong([Allowed("web", "db", 8000, 9100)]) == []
    assert len(both.wrong([Allowed("web", "db", 8081, 9090)])) == 1


def test_plain_rendering():
    lines = render(seen(web_db_8080=Outcome("accepted", "db-0")), ALLOWED, Terminal())
    assert lines == [
        "         web-0  db-0",
        "         cell-1 cell-2",
        "  web-0  -      8080",
        "  db-0   .      -",
    ]


def test_what_is_wrong_is_marked():
    lines = render(seen(db_web_9090=Outcome("accepted", "web-0")), ALLOWED, Terminal())
    assert lines[2:] == ["  web-0  -      .!", "  db-0   9090!  -"]
    assert "!" not in "".join(render(seen(), None, Terminal()))


def test_colour_only_on_a_terminal():
    terminal = Terminal()
    assert "\x1b" not in "".join(render(seen(), ALLOWED, terminal))
    terminal.coloured = True
    assert "\x1b[1;37;41m.!\x1b[0m" in "".join(render(seen(), ALLOWED, terminal))
