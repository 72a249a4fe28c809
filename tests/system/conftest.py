"""A lab for each module of system tests, and the ends of its logs with each failure."""

import itertools
import os

import pytest

from compose.lab import lifecycle
from compose.lab.lab import Lab

LOG_LINES = 15


@pytest.fixture(scope="module")
def lab():
    """A lab of two cells, with containers web-0 and api-0 on cell-1, web-1 and api-1 on cell-2."""
    lifecycle.sweep()
    with lifecycle.made(f"t{os.getpid()}", 2) as made:
        for app in ("web", "api"):
            made.run_app(app, ["cell-1", "cell-2"])
        yield made


@pytest.fixture
def gateway(lab):
    return lab.gateway()


@pytest.fixture(autouse=True)
def mended(request):
    """After each test every service runs again and no policy is left, so that a failure stays alone."""
    yield
    lab = request.node.funcargs.get("lab")
    if isinstance(lab, Lab):
        for name, process in list(lab.state.services.items()):
            if not process.alive():
                lab.start(name)
        pairs = itertools.product(("web", "api"), repeat=2)
        rules = [lab.rule(*pair, *ports) for pair in pairs for ports in ((8080,), (9090,), (8080, 9090))]
        lab.settle(lab.gateway().remove(*rules).revision)


@pytest.fixture
def policy(lab, gateway):
    """A policy web -> api on TCP port 8080, in every kernel, removed after the test."""
    rule = lab.rule("web", "api", 8080)
    lab.settle(gateway.add(rule).revision)
    yield rule
    lab.settle(gateway.remove(rule).revision)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    lab = getattr(item, "funcargs", {}).get("lab")
    if report.failed and isinstance(lab, Lab):
        for log in sorted((lab.layout.data / "log").glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            report.sections.append((f"log {log.stem}", "\n".join(line[:2000] for line in lines)))
    return report
