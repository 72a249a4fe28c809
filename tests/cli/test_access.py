"""allow-access, remove-access, deny-access and list-access (contract/policy.md 6.1)."""

import pytest

from cli import terminal
from cli.access import _table
from tests.cli.conftest import WRONG_TOKEN, Result, Run
from tests.cli.test_main import on_terminal

ALLOW = ("front", "back", "--protocol", "tcp", "--port", "8080")


def test_access_is_allowed_listed_and_removed(silkbus: Run) -> None:
    assert silkbus("allow-access", *ALLOW) == Result(0, "Allowing traffic from front to back...\nOK\n\n\n", "")
    assert silkbus("list-access") == Result(
        0, "Listing policies...\nOK\n\nSource\tDestination\tProtocol\tPorts\nfront\tback\t\ttcp\t\t8080-8080\n", ""
    )
    assert silkbus("remove-access", *ALLOW) == Result(0, "Denying traffic from front to back...\nOK\n\n\n", "")
    nothing = "Listing policies...\nOK\n\nSource\tDestination\tProtocol\tPorts\n\n"
    assert silkbus("list-access") == Result(0, nothing, "")
    assert silkbus("deny-access", *ALLOW).out == "Denying traffic from front to back...\nOK\n\n\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70-80", "--protocol", "udp"],
        ["-protocol=udp", "-port=70-80"],
        ["--protocol=udp", "--port", "70-80", "--directory", "DIRECTORY"],
    ],
)
def test_flags_in_every_form(silkbus: Run, environment: dict[str, str], flags: list[str]) -> None:
    flags = [flag.replace("DIRECTORY", environment["SILKBUS_DIRECTORY"]) for flag in flags]
    assert silkbus("allow-access", "front", "back", *flags).code == 0
    assert "front\tback\t\tudp\t\t70-80\n" in silkbus("list-access").out


def test_the_list_of_one_app_and_of_one_space(silkbus: Run) -> None:
    for source, destination in (("front", "back"), ("back", "db"), ("db", "guid-web-1")):
        assert silkbus("allow-access", source, destination, "--protocol", "tcp", "--port", "1").code == 0
    of_one = silkbus("list-access", "--app", "back").out.splitlines()[4:]
    assert [line.split("\t")[0] for line in of_one] == ["front", "back"]
    assert silkbus("list-access", "--app=back").out.splitlines()[4:] == of_one
    # Both ends must be in the targeted space.
    of_space = silkbus("list-access", SILKBUS_ORG="acme", SILKBUS_SPACE="dev").out.splitlines()[4:]
    assert of_space == ["front\tback\t\ttcp\t\t1-1"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], ""),
        (["front"], ""),
        (["front", "back"], ""),
        (["front", "back", "--port", "1"], ""),
        (["--port", "1", "--protocol", "tcp", "front", "back"], ""),
        (["front", "back", "--port", "1", "--protocol", "tcp", "more"], ""),
        (["front", "back", "--ports", "1", "--protocol", "tcp"], "flag provided but not defined: -ports"),
        (["front", "back", "--port", "x", "--protocol", "tcp"], "Port is not valid: x"),
        (["front", "back", "--port", "1-2-3", "--protocol", "tcp"], "Port is not valid: 1-2-3"),
        (["front", "back", "--port", "0", "--protocol", "tcp"], "Port is not valid. Must be in range <1-65535>."),
        (["front", "back", "--port", "1-65536", "--protocol", "tcp"], "Port is not valid. Must be in range <1-65535>."),
        (["front", "back", "--port", "1", "--protocol", "icmp"], "Protocol is not valid. Must be tcp or udp."),
    ],
)
def test_wrong_usage(bare: Run, arguments: list[str], reason: str) -> None:
    for command in ("allow-access", "remove-access"):
        result = bare(command, *arguments)
        assert (result.code, result.err) == (2, "")
        assert result.out.startswith(f"FAILED\nIncorrect usage. {reason}\n\nusage: silkbus {command} SOURCE_APP ")


def test_failures_say_what_was_being_done(silkbus: Run) -> None:
    assert silkbus("allow-access", "nope", *ALLOW[1:]) == Result(
        1, "Allowing traffic from nope to back...\nFAILED\nresolving source app: nope not found\n", ""
    )
    result = silkbus("remove-access", "front", "nope", *ALLOW[2:])
    assert result.out.endswith("FAILED\nresolving destination app: nope not found\n")
    result = silkbus("allow-access", *ALLOW, **WRONG_TOKEN)
    assert result.out.endswith("FAILED\nadding policies: 401 Unauthorized: failed to verify token with uaa\n")
    result = silkbus("remove-access", *ALLOW, **WRONG_TOKEN)
    assert result.out.endswith("FAILED\ndeleting policies: 401 Unauthorized: failed to verify token with uaa\n")
    result = silkbus("list-access", **WRONG_TOKEN)
    assert result.out.endswith("FAILED\ngetting policies: 401 Unauthorized: failed to verify token with uaa\n")


def test_help(bare: Run) -> None:
    result = bare("list-access", "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("usage: silkbus list-access [--app appName]\n")
    assert "silkbus list-access --app frontend" in result.out


def test_colours_are_the_plugins(environment: dict[str, str]) -> None:
    wanted = {**environment, "TERM": "xterm", "NO_COLOR": ""}
    assert on_terminal(wanted, "allow-access", *ALLOW) == (
        "Allowing traffic from \x1b[36;1mfront\x1b[0m to \x1b[36;1mback\x1b[0m...\n\x1b[32;1mOK\n\x1b[0m\n\n"
    )
    assert on_terminal(wanted, "list-access") == (
        "Listing policies...\n\x1b[32;1mOK\n\x1b[0m\n\x1b[;1mSource\tDestination\tProtocol\tPorts\n"
        "\x1b[0m\x1b[36;1mfront\x1b[0m\t\x1b[36;1mback\x1b[0m\t\ttcp\t\t8080-8080\n"
    )


def test_columns_are_wide_enough_by_tabs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "colours", lambda: True)
    header = ("Source", "Destination", "Protocol", "Ports")
    _table(header, [("frontend", "backend", "tcp", "8080-8090"), ("abcdefgh", "averyveryverylongname", "udp", "1-1")])
    shown = capsys.readouterr().out
    for code, mark in (("\x1b[;1m", "<BOLD>"), ("\x1b[36;1m", "<CLR_C>"), ("\x1b[0m", "<RESET>")):
        shown = shown.replace(code, mark)
    assert shown == (
        "<BOLD>Source\t\tDestination\t\tProtocol\tPorts\n"
        "<RESET><CLR_C>frontend<RESET>\t<CLR_C>backend<RESET>\t\t\ttcp\t\t8080-8090\n"
        "<CLR_C>abcdefgh<RESET>\t<CLR_C>averyveryverylongname<RESET>\tudp\t\t1-1\n"
    )
