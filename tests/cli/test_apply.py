"""apply, diff and export against a real policy server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.conftest import APPS, WRONG_TOKEN, Run
from tests.policy.server import ADMIN_TOKEN, DELETE, POLICIES, PolicyServer, body, policy

BASIC = """\
policies:
- source: [acme/dev/front, acme/prod/web]
  destination: acme/dev/back
  tcp: [8080, 9000-9010]
- source: acme/dev/front
  destination: acme/prod/db
  tcp: 5432
  udp: 53
"""
BASIC_POLICIES = {
    ("guid-front", "guid-back", "tcp", 8080, 8080),
    ("guid-front", "guid-back", "tcp", 9000, 9010),
    ("guid-web-2", "guid-back", "tcp", 8080, 8080),
    ("guid-web-2", "guid-back", "tcp", 9000, 9010),
    ("guid-front", "guid-db", "tcp", 5432, 5432),
    ("guid-front", "guid-db", "udp", 53, 53),
}
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        path = tmp_path / "policies.yml"
        path.write_text(text)
        return str(path)

    return write


def present(server: PolicyServer, token: str = ADMIN_TOKEN) -> set[tuple[Any, ...]]:
    with server.client(token) as client:
        return {
            (
                item["source"]["id"],
                item["destination"]["id"],
                item["destination"]["protocol"],
                item["destination"]["ports"]["start"],
                item["destination"]["ports"]["end"],
            )
            for item in client.get(POLICIES).json()["policies"]
        }


def revision(server: PolicyServer) -> int:
    with server.client() as client:
        return int(client.get("/networking/v1/external/history").json()["history"][0]["revision"])


def add(server: PolicyServer, *policies: Any) -> None:
    with server.client() as client:
        client.post(POLICIES, json=body(*policies)).raise_for_status()


def test_a_file_is_applied_in_one_change_and_applying_it_again_changes_nothing(
    silkbus: Run, standing_server: PolicyServer, write: Write
) -> None:
    file = write(BASIC)
    add(standing_server, policy("x", "y"))
    before = revision(standing_server)
    result = silkbus("apply", "-f", file)
    assert (result.code, result.err) == (0, "")
    assert "+ acme/dev/front → acme/prod/db udp 53\n" in result.out
    assert result.out.endswith("6 policies added, 0 removed, 0 as they should be.\nOK\n\n")
    assert present(standing_server) == {*BASIC_POLICIES, ("x", "y", "tcp", 8080, 8080)}
    assert revision(standing_server) == before + 1
    assert "0 policies added, 0 removed, 6 as they should be." in silkbus("apply", "-f", file, "--prune").out
    assert revision(standing_server) == before + 1
    assert silkbus("diff", "-f", file).code == 0


def test_only_policies_within_the_spaces_that_the_file_names_are_pruned(
    silkbus: Run, standing_server: PolicyServer, write: Write
) -> None:
    text = "policies:\n- {source: acme/dev/front, destination: acme/dev/back, tcp: 8080}\n"
    inside = [policy("guid-front", "guid-back", 1), policy("guid-back", "guid-web-1", 2)]
    outside = [
        policy("guid-front", "guid-db"),
        policy("guid-db", "guid-back"),
        policy("guid-db", "guid-web-2"),
        policy("x", "y"),
    ]
    add(standing_server, *inside, *outside)
    kept = silkbus("apply", "-f", write(text))
    assert kept.code == 0
    assert "2 policies of these spaces not in " in kept.out
    assert len(present(standing_server)) == 7
    before = revision(standing_server)
    pruned = silkbus("apply", "-f", write(text), "--prune")
    assert "- acme/dev/back → acme/dev/web tcp 2\n" in pruned.out
    assert revision(standing_server) == before + 1
    left = {(source, destination) for source, destination, *_ in present(standing_server)}
    assert left == {
        ("guid-front", "guid-back"),
        ("guid-front", "guid-db"),
        ("guid-db", "guid-back"),
        ("guid-db", "guid-web-2"),
        ("x", "y"),
    }
    # The space of a destination alone is not the file's to tidy up; once it is named for itself, it is.
    elsewhere = "policies:\n- {source: acme/dev/front, destination: acme/prod/db, tcp: 8080}\n"
    assert "1 to remove" in silkbus("apply", "-f", write(elsewhere), "--prune", "--dry-run").out
    named = silkbus("apply", "-f", write("spaces: [acme/prod]\n" + elsewhere), "--prune", "--dry-run").out
    assert "- acme/prod/db → acme/prod/web tcp 8080\n" in named
    assert "3 to remove" in named


def test_a_space_without_policies_is_named_by_itself(silkbus: Run, standing_server: PolicyServer, write: Write) -> None:
    add(standing_server, policy("guid-front", "guid-back"), policy("guid-db", "guid-web-2"))
    assert silkbus("apply", "-f", write("org: acme\nspace: dev\npolicies: []\n"), "--prune").code == 0
    assert present(standing_server) == {("guid-db", "guid-web-2", "tcp", 8080, 8080)}


def test_after_a_blue_green_push_the_file_is_applied_again(
    silkbus: Run, standing_server: PolicyServer, write: Write, environment: dict[str, str]
) -> None:
    file = write(BASIC)
    assert silkbus("apply", "-f", file).code == 0
    apps = [{**app, "guid": "guid-front-green"} if app["name"] == "front" else app for app in APPS]
    Path(environment["SILKBUS_DIRECTORY"]).write_text(json.dumps({"apps": apps}))
    green = {
        ("guid-front-green", *rest) if source == "guid-front" else (source, *rest) for source, *rest in BASIC_POLICIES
    }
    applied = silkbus("apply", "-f", file)
    assert applied.code == 0
    assert present(standing_server) == BASIC_POLICIES | green
    assert "4 policies of these spaces not in" in applied.out
    assert silkbus("apply", "-f", file, "--prune").code == 0
    assert present(standing_server) == green


def test_a_dry_run_and_a_diff_change_nothing_and_tell_by_their_exit_code(
    silkbus: Run, standing_server: PolicyServer, write: Write
) -> None:
    file = write(BASIC)
    add(standing_server, policy("guid-front", "guid-web-1"))
    before = present(standing_server)
    dry = silkbus("apply", "-f", file, "--dry-run")
    assert (dry.code, dry.err) == (1, "")
    assert dry.out.endswith(
        "6 policies to add, 0 to remove, 0 as they should be.\n"
        f"1 policy of these spaces not in {file}; --prune removes them.\n"
    )
    difference = silkbus("diff", "-f", file)
    assert difference.code == 1
    assert "- acme/dev/front → acme/dev/web tcp 8080\n6 policies to add, 1 to remove, 0" in difference.out
    assert present(standing_server) == before
    value = json.loads(silkbus("diff", "-f", file, "-o", "json").out)
    assert [len(value[name]) for name in ("add", "remove", "extra", "kept")] == [6, 1, 0, 0]
    assert value["remove"][0]["destination"] == {"guid": "guid-web-1", "name": "web", "space": "dev", "org": "acme"}


def test_what_is_exported_is_applied_without_a_change(
    silkbus: Run, standing_server: PolicyServer, write: Write
) -> None:
    assert silkbus("apply", "-f", write(BASIC)).code == 0
    add(standing_server, policy("x", "guid-back", 1, 65535, "udp"), policy("x", "x"))
    exported = silkbus("export")
    assert exported.code == 0
    assert "- source: {guid: x}\n" in exported.out
    assert "acme/dev/back" in exported.out
    for text in (exported.out, silkbus("export", "-o", "json").out):
        assert silkbus("apply", "-f", write(text), "--prune", "--dry-run").code == 0
    of_space = silkbus("export", SILKBUS_ORG="acme", SILKBUS_SPACE="prod").out
    assert "prod/web" in of_space
    assert "guid: x" not in of_space
    assert "guid: x" in silkbus("export", "--all", SILKBUS_ORG="acme", SILKBUS_SPACE="prod").out


ENDS = st.sampled_from([*(app["guid"] for app in APPS), "gone", "no app, but 'a: [group'"])
RANGES = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(sorted)
SOME = st.sets(st.tuples(ENDS, ENDS, st.sampled_from(["tcp", "udp"]), RANGES.map(tuple)), max_size=8)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=SOME, second=SOME)
def test_applying_an_export_with_prune_brings_back_what_was(
    silkbus: Run, standing_server: PolicyServer, write: Write, first: set[Any], second: set[Any]
) -> None:
    def these(wanted: set[Any]) -> list[Any]:
        return [policy(source, end, *ports, protocol) for source, end, protocol, ports in wanted]

    with standing_server.client() as client:
        if there := client.get(POLICIES).json()["policies"]:
            client.post(DELETE, json={"policies": there}).raise_for_status()
    if first:
        add(standing_server, *these(first))
    before = present(standing_server)
    exported = "spaces: [acme/dev, acme/prod]\n" + silkbus("export").out
    assert silkbus("diff", "-f", write(exported)).code == 0
    if second:
        add(standing_server, *these(second))
    assert silkbus("apply", "-f", write(exported), "--prune").code == 0
    unknown = {"gone", "no app, but 'a: [group'"}
    # What is between two apps that nobody knows is in no space.
    assert {item for item in present(standing_server) if not {item[0], item[1]} <= unknown} == {
        item for item in before if not {item[0], item[1]} <= unknown
    }


def test_all_unknown_apps_are_named_at_once(silkbus: Run, standing_server: PolicyServer, write: Write) -> None:
    file = write(
        "org: acme\nspace: dev\npolicies:\n- {source: front, destination: back, tcp: 1}\n"
        "- source: [nobody, front]\n  destination: other/space/app\n  tcp: 2\n"
    )
    result = silkbus("apply", "-f", file)
    assert result.code == 2
    assert result.err == (
        f"{file}:5: App 'nobody' not found in org acme / space dev.\n"
        f"{file}:6: App 'app' not found in org other / space space.\n"
    )
    assert present(standing_server) == set()


def test_apps_without_a_space_are_those_of_the_targeted_one(
    silkbus: Run, standing_server: PolicyServer, write: Write
) -> None:
    file = write("policies:\n- {source: web, destination: db, tcp: 1}\n")
    result = silkbus("apply", "-f", file)
    assert result.code == 2
    assert f"{file}:2: App 'web' is ambiguous" in result.err
    assert silkbus("apply", "-f", file, SILKBUS_ORG="acme", SILKBUS_SPACE="prod").code == 0
    assert present(standing_server) == {("guid-web-2", "guid-db", "tcp", 1, 1)}


@pytest.mark.parametrize("command", ["apply", "diff"])
def test_errors_have_a_code_of_their_own(silkbus: Run, write: Write, tmp_path: Path, command: str) -> None:
    assert silkbus(command).code == 2
    missing = silkbus(command, "-f", str(tmp_path / "nothing"))
    assert (missing.code, missing.err) == (2, f"{tmp_path / 'nothing'} cannot be read: No such file or directory\n")
    wrong = silkbus(command, "-f", write("policies:\n- {source: a, destination: b, tcp: x}\n"))
    assert wrong.code == 2
    assert "policies.yml:2: tcp: 'x' is no port" in wrong.err
    (tmp_path / "policies.yml").write_bytes(b"policies: []\n# \xff")
    assert "policies.yml:2: is not UTF-8 text" in silkbus(command, "-f", str(tmp_path / "policies.yml")).err
    refused = silkbus(command, "-f", write(BASIC), **WRONG_TOKEN)
    assert refused.code == 2
    assert "failed to verify token" in refused.err


def test_which_of_two_apps_of_one_name_is_meant_is_not_guessed(
    silkbus: Run, standing_server: PolicyServer, write: Write, tmp_path: Path
) -> None:
    """A directory that lists the old app, too, after a blue-green push."""
    directory = tmp_path / "twice.json"
    directory.write_text(json.dumps({"apps": [*APPS, {**APPS[1], "guid": "guid-back-old"}]}))
    file = write("org: acme\nspace: dev\npolicies:\n- {source: front, destination: back, tcp: 80}\n")
    for command in ("apply", "diff"):
        result = silkbus(command, "-f", file, SILKBUS_DIRECTORY=str(directory))
        assert (result.code, result.out) == (2, "FAILED\n")
        assert f"{file}:4: App 'back' is ambiguous: guid-back (" in result.err
        assert f"Give its GUID; or leave only one of them in {directory}." in result.err
    assert present(standing_server) == set()
