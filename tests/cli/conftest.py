import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.foundation import CfUaa, Controller, Foundation
from tests.cli.warm import Warm
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer
from tests.policy.stubs import certificate

WRONG_TOKEN = {"SILKBUS_TOKEN": "wrong"}
PROGRAM = Path(sys.executable).with_name("silkbus")
APPS = [
    {"guid": "guid-front", "name": "front", "space": "dev", "org": "acme"},
    {"guid": "guid-back", "name": "back", "space": "dev", "org": "acme"},
    {"guid": "guid-db", "name": "db", "space": "prod", "org": "acme"},
    {"guid": "guid-web-1", "name": "web", "space": "dev", "org": "acme"},
    {"guid": "guid-web-2", "name": "web", "space": "prod", "org": "acme"},
]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="package")
def standing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    server = PolicyServer(tmp_path_factory.mktemp("policy"))
    server.start()
    yield server
    server.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with nothing in it, and a directory of apps beside it."""
    (tmp_path / "apps.json").write_text(json.dumps({"apps": APPS}))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture(scope="package")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    made = Warm(tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


@pytest.fixture
def bare(home: Path, warm: Warm) -> Run:
    """Runs silkbus with no configuration but the environment given."""

    def run(*arguments: str, **environment: str) -> Result:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SILKBUS_", "XDG_", "CF_"))}
        variables = {**kept, "HOME": str(home), **environment}
        if not any(name.startswith("PYTHON") for name in environment):  # those Python reads when it starts
            return Result(*warm.call(arguments, variables))
        done = subprocess.run(
            [PROGRAM, *arguments],
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def environment(home: Path, standing_server: PolicyServer) -> dict[str, str]:
    """Where a server without policies is, and the directory of apps."""
    with standing_server.client() as client:
        if policies := client.get(POLICIES).json()["policies"]:
            client.post(DELETE, json={"policies": policies}).raise_for_status()
    return {
        "SILKBUS_API": standing_server.url,
        "SILKBUS_TOKEN": ADMIN_TOKEN,
        "SILKBUS_DIRECTORY": str(home.parent / "apps.json"),
    }


@pytest.fixture
def silkbus(bare: Run, environment: dict[str, str]) -> Run:
    """Runs silkbus against the server."""

    def run(*arguments: str, **more: str) -> Result:
        return bare(*arguments, **{**environment, **more})

    return run


@pytest.fixture(scope="package")
def standing_foundation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foundation]:
    folder = tmp_path_factory.mktemp("foundation")
    authority, files = certificate(folder)
    uaa = CfUaa(files)
    host, _, port = uaa.url.rpartition(":")
    server = PolicyServer(folder, auth="uaa-keys", uaa_url=host, uaa_port=port, uaa_ca=authority)
    controller = Controller(uaa, server.url, files)
    try:
        for stub in (uaa, controller):
            stub.start()
        server.start()
        yield Foundation(server, uaa, controller, authority)
    finally:
        server.close()
        for stub in (uaa, controller):
            stub.stop()


@pytest.fixture
def place(standing_foundation: Foundation) -> Foundation:
    """A foundation without policies, and with nothing amiss."""
    standing = standing_foundation
    fresh = Controller(standing.uaa, standing.server.url)
    standing.controller.orgs, standing.controller.spaces, standing.controller.apps = (
        fresh.orgs,
        fresh.spaces,
        fresh.apps,
    )
    standing.uaa.fault = standing.controller.fault = None
    standing.uaa.revoked.clear()
    standing.uaa.forms.clear()
    standing.uaa.refresh_tokens = {"refresh-0"}
    with standing.server.client(standing.token) as client:
        if policies := client.get(POLICIES).json()["policies"]:
            client.post(DELETE, json={"policies": policies}).raise_for_status()
    standing.asked()
    return standing
