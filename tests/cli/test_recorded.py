"""What cf CLI 7.3 really sent and got, and whether we send the same and say the same."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.cli.conftest import Run
from tests.policy.stubs import Stub

RECORDING = Path(__file__).parent / "data" / "cf-cli-7.3.jsonl"
TOKEN = "bearer a.b.c"  # noqa: S105
TABLE = "source   destination   protocol   ports       destination space   destination org\n"


@dataclass
class Command:
    line: str
    exchanges: list[dict[str, Any]] = field(default_factory=list)

    def sent(self, method: str) -> list[tuple[str, str]]:
        return [(item["path"], item["body"]) for item in self.exchanges if item["method"] == method]


def commands() -> list[Command]:
    """The commands in their order. Those that follow the last mark are of an older cf."""
    found: list[Command] = []
    for line in RECORDING.read_text().splitlines():
        record = json.loads(line)
        if "mark" in record:
            found.append(Command(record["mark"]))
        else:
            found[-1].exchanges.append(record)
    return found[:-1]


class Recorded(Stub):
    """Answers as was recorded of a command, or else of any."""

    def __init__(self, command: Command, every: list[Command]) -> None:
        super().__init__()
        exchanges = [item for other in [*every, command] for item in other.exchanges]
        self.answers = {(item["method"], item["path"]): item["response"] for item in exchanges}
        self.sent: list[tuple[str, str, str]] = []
        self.headers: list[dict[str, str]] = []

    async def answer(self, request: Request) -> Response:
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        self.sent.append((request.method, path, (await request.body()).decode()))
        self.headers.append(dict(request.headers))
        return JSONResponse(self.answers[request.method, path])


def replay(bare: Run, home: Path, command: Command) -> tuple[Recorded, str, int]:
    """Run what followed `cf`; what we sent, and what came out."""
    stub = Recorded(command, commands())
    stub.start()
    content = {
        "AccessToken": TOKEN,
        "NetworkPolicyV1Endpoint": f"{stub.url}/networking/v1/external",
        "OrganizationFields": {"GUID": "org-guid-1", "Name": "myorg"},
        "SpaceFields": {"GUID": "space-guid-1", "Name": "dev"},
        "Target": stub.url,
    }
    (home / ".cf").mkdir(exist_ok=True)
    (home / ".cf" / "config.json").write_text(json.dumps(content))
    try:
        result = bare(*shlex.split(command.line)[1:])
    finally:
        stub.stop()
    return stub, result.out + result.err, result.code


@pytest.mark.parametrize("number", range(3, len(commands())), ids=lambda number: commands()[number].line)
def test_the_same_requests_change_the_same(bare: Run, home: Path, number: int) -> None:
    command = commands()[number]
    assert "network-polic" in command.line
    stub, _, code = replay(bare, home, command)
    assert [(path, body) for method, path, body in stub.sent if method == "POST"] == command.sent("POST")
    listed = [path for path, _ in command.sent("GET") if "/networking/" in path]
    assert [path for method, path, _ in stub.sent if method == "GET" and "/networking/" in path] == listed
    assert {header["authorization"] for header in stub.headers} <= {TOKEN}
    for headers, (method, *_) in zip(stub.headers, stub.sent, strict=True):
        assert headers["accept"] == "application/json"
        assert headers.get("content-type") == ("application/json" if method == "POST" else None)
    usage = ("icmp", "--protocol tcp", "--port 80")
    assert code == (2 if command.line.endswith((*usage[1:], "icmp --port 1")) else 1 if "nope" in command.line else 0)


def said(bare: Run, home: Path, line: str, which: int = 0) -> str:
    command = [command for command in commands() if command.line == f"cf {line}"][which]
    return replay(bare, home, command)[1]


def test_the_same_is_said(bare: Run, home: Path) -> None:
    place = "in org myorg / space dev"
    assert said(bare, home, "network-policies", 1) == (
        f"Listing network policies {place}...\n\n{TABLE}"
        "app-a    app-b         tcp        8080        dev                 myorg\n"
        "app-a    app-c         udp        7000-7010   prod                other\n"
    )
    assert said(bare, home, "network-policies --source app-a").startswith(
        f"Listing network policies of app app-a {place}...\n\n{TABLE}app-a    app-b "
    )
    assert said(bare, home, "add-network-policy app-a app-b") == (
        f"Adding network policy from app app-a to app app-b {place}...\nOK\n\n"
    )
    assert said(bare, home, "add-network-policy app-a app-c -o other -s prod --protocol udp --port 7000-7010") == (
        f"Adding network policy from app app-a {place} to app app-c in org other / space prod...\nOK\n\n"
    )
    remove = "remove-network-policy app-a app-b --protocol tcp --port 8080"
    assert said(bare, home, remove) == (f"Removing network policy from app app-a to app app-b {place}...\nOK\n\n")
    assert said(bare, home, remove, 1) == (
        f"Removing network policy from app app-a to app app-b {place}...\nPolicy does not exist.\nOK\n\n"
    )
    assert said(bare, home, remove.replace("app-b", "app-nope")) == (
        "FAILED\nApp 'app-nope' not found in org myorg / space dev.\n"
    )
