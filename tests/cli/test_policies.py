"""The three commands against a real policy server (contract/policy.md 6.2)."""

import json

import pytest

from tests.cli.conftest import WRONG_TOKEN, Result, Run
from tests.policy.server import READER_TOKEN, PolicyServer

HEADER = ("source", "destination", "protocol", "ports", "destination space", "destination org")


def rows(result: Result) -> list[tuple[str, ...]]:
    """The rows of `network-policies`, split where its header says."""
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("source"))
    assert lines[header - 1] == ""
    starts = [lines[header].index(name) for name in HEADER[:4]]
    starts += [lines[header].index(name, starts[3]) for name in HEADER[4:]]
    ends = [*starts[1:], None]
    return [
        tuple(line[start:end].rstrip() for start, end in zip(starts, ends, strict=True)) for line in lines[header + 1 :]
    ]


def test_a_policy_is_added_listed_and_removed(silkbus: Run) -> None:
    assert silkbus("add-network-policy", "front", "back") == Result(
        0, "Adding network policy from app front to app back in org acme / space dev...\nOK\n\n", ""
    )
    assert rows(silkbus("network-policies")) == [("front", "back", "tcp", "8080", "dev", "acme")]
    assert silkbus("remove-network-policy", "front", "back", "--protocol", "tcp", "--port", "8080") == Result(
        0, "Removing network policy from app front to app back in org acme / space dev...\nOK\n\n", ""
    )
    assert silkbus("network-policies") == Result(
        0,
        "Listing network policies...\n\n"
        "source   destination   protocol   ports   destination space   destination org\n",
        "",
    )


def test_another_space_ranges_and_protocols(silkbus: Run) -> None:
    result = silkbus("add-network-policy", "front", "web", "-s", "prod", "--protocol", "UDP", "--port", "7000-7010")
    text = "Adding network policy from app front in org acme / space dev to app web in org acme / space prod...\nOK\n\n"
    assert result == Result(0, text, "")
    assert rows(silkbus("network-policies")) == [("front", "web", "udp", "7000-7010", "prod", "acme")]


def test_the_list_of_one_source_or_of_the_targeted_space(silkbus: Run) -> None:
    for source, destination in (("front", "back"), ("back", "db"), ("db", "guid-web-1")):
        assert silkbus("add-network-policy", source, destination).code == 0
    of_one = silkbus("network-policies", "--source", "back")
    assert of_one.out.startswith("Listing network policies of app back...\n")
    assert [row[:2] for row in rows(of_one)] == [("back", "db")]
    of_space = silkbus("network-policies", SILKBUS_SPACE="prod", SILKBUS_ORG="acme")
    assert of_space.out.startswith("Listing network policies in org acme / space prod...\n")
    assert [row[:2] for row in rows(of_space)] == [("db", "web")]


def test_as_json(silkbus: Run) -> None:
    silkbus("add-network-policy", "front", "back")
    assert json.loads(silkbus("network-policies", "--output", "json").out) == [
        {
            "source": {"guid": "guid-front", "name": "front", "space": "dev", "org": "acme"},
            "destination": {"guid": "guid-back", "name": "back", "space": "dev", "org": "acme"},
            "protocol": "tcp",
            "ports": {"start": 8080, "end": 8080},
        }
    ]


def test_removing_what_is_not_there_is_fine(silkbus: Run) -> None:
    silkbus("add-network-policy", "front", "back", "--protocol", "tcp", "--port", "80-90")
    result = silkbus("remove-network-policy", "front", "back", "--protocol", "tcp", "--port", "80")
    assert result.code == 0
    assert result.out.endswith("\nPolicy does not exist.\nOK\n\n")
    assert len(rows(silkbus("network-policies"))) == 1


def test_without_a_directory_names_are_guids(silkbus: Run) -> None:
    assert silkbus("add-network-policy", "x", "y", SILKBUS_DIRECTORY="").out.startswith(
        "Adding network policy from app x to app y...\n"
    )
    assert rows(silkbus("network-policies", SILKBUS_DIRECTORY="")) == [("x", "y", "tcp", "8080", "", "")]
    result = silkbus("add-network-policy", "x", "y", "-s", "dev", SILKBUS_DIRECTORY="")
    assert result.code == 2
    assert (
        "names of apps, spaces and orgs need a directory of apps (--directory FILE, SILKBUS_DIRECTORY) or a login"
        in result.err
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["front"], "the required argument `DESTINATION_APP` was not provided"),
        ([], "the required arguments `SOURCE_APP` and `DESTINATION_APP` were not provided"),
        (["a", "b", "--port", "80"], "--protocol and --port flags must be specified together"),
        (["a", "b", "--protocol", "tcp"], "--protocol and --port flags must be specified together"),
        (
            ["a", "b", "-o", "acme"],
            "A space must be provided when an org is provided, but the '-s' flag was not specified.",
        ),
        (["a", "b", "--protocol", "icmp", "--port", "1"], 'PROTOCOL must be "tcp" or "udp"'),
        (["a", "b", "--protocol", "tcp", "--port", "x"], "PORT must be a positive integer"),
        (["a", "b", "--protocol", "tcp", "--port", "1-2-3"], "PORT syntax must match integer[-integer]"),
        (["a", "b", "c"], "unrecognized arguments: c"),
    ],
)
def test_wrong_usage(bare: Run, arguments: list[str], text: str) -> None:
    result = bare("add-network-policy", *arguments)
    assert (result.code, result.out) == (2, "FAILED\n")
    assert result.err.startswith(f"Incorrect Usage: {text}\n\nusage: silkbus add-network-policy")


def test_removing_needs_both_flags(bare: Run) -> None:
    result = bare("remove-network-policy", "a", "b", "--port", "80")
    assert result.err.startswith("Incorrect Usage: the required flag `--protocol' was not specified\n")
    result = bare("remove-network-policy", "a", "b")
    assert "the required flags `--protocol' and `--port' were not specified" in result.err


def failed(result: Result, text: str) -> None:
    assert (result.code, result.err) == (1, text + "\n")
    assert result.out.endswith("FAILED\n")


def test_apps_that_cannot_be_told(silkbus: Run, environment: dict[str, str]) -> None:
    apps = environment["SILKBUS_DIRECTORY"]
    failed(silkbus("add-network-policy", "nope", "back"), f"App 'nope' not found. The apps are those of {apps}.")
    failed(
        silkbus("add-network-policy", "front", "db", "-s", "dev"),
        f"App 'db' not found in org acme / space dev. The apps are those of {apps}.",
    )
    failed(
        silkbus("add-network-policy", "front", "web"),
        "App 'web' is ambiguous: guid-web-1 (org acme / space dev), guid-web-2 (org acme / space prod). "
        "Give its GUID, or name its space with -s (the destination's) or SILKBUS_SPACE (the source's).",
    )


def test_the_servers_refusals_are_shown(silkbus: Run) -> None:
    failed(
        silkbus("network-policies", **WRONG_TOKEN),
        "failed to verify token with uaa\n"
        "TIP: the token is not valid, or has expired: log in again (`cf login`), or give another token.",
    )
    failed(
        silkbus("network-policies", SILKBUS_TOKEN=READER_TOKEN),
        "provided scopes [a b] do not include allowed scopes [network.admin network.write]\n"
        "TIP: ask an administrator for the scope network.write or network.admin.",
    )
    failed(
        silkbus("add-network-policy", "front", "back", "--protocol", "tcp", "--port", "90-80"),
        "mapper: validate policies: invalid port range 90-80, start must be less than or equal to end",
    )


def test_a_server_that_is_not_there(silkbus: Run, standing_server: PolicyServer) -> None:
    result = silkbus("network-policies", SILKBUS_API="http://127.0.0.1:9")
    assert result.code == 1
    assert "http://127.0.0.1:9 refused the connection, trying once more" in result.err
    assert "cannot be reached: [Errno 111] Connection refused. Is it up, and the URL right?" in result.err
    failed(
        silkbus("network-policies", SILKBUS_API=standing_server.url + "/elsewhere"),
        "Error Code: 404\nRaw Response: 404 page not found",
    )


def test_programs_are_told_the_revision_and_whether_there_was_anything_to_remove(silkbus: Run) -> None:
    change = ("front", "back", "--protocol", "tcp", "--port", "80", "--output", "json")
    added = json.loads(silkbus("add-network-policy", *change).out)
    removed = json.loads(silkbus("remove-network-policy", *change).out)
    assert (removed["revision"], removed["existed"]) == (added["revision"] + 1, True)
    again = json.loads(silkbus("remove-network-policy", *change).out)
    assert (again["revision"], again["existed"]) == (None, False)
