"""The program itself: help, other packages' commands, configuration, terminals."""

import json
import os
import pty
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

from cli.main import COMMANDS, GROUP, find
from tests.cli.conftest import PROGRAM, WRONG_TOKEN, Result, Run
from tests.policy.server import ADMIN_TOKEN, PolicyServer


def test_help_lists_all_commands(bare: Run) -> None:
    result = bare("--help")
    assert (result.code, result.err) == (0, "")
    for name in [*COMMANDS, *(entry.name for entry in entry_points(group=GROUP))]:
        assert f"\n  {name}" in result.out
    for name in COMMANDS:
        assert bare(name, "--help").out.startswith(f"usage: silkbus {name}")
    assert bare().code == 2


def test_an_unknown_command_is_wrong_usage(bare: Run) -> None:
    text = "silkbus: no command 'frobnicate'; `silkbus --help` lists them\n"
    assert bare("frobnicate") == Result(2, "", text)
    assert "(did you mean network-policies or " in bare("network-policie").err


def test_every_command_that_is_listed_is_there() -> None:
    for name in COMMANDS:
        assert find(name) is not None
    assert find("nothing") is None


def test_help_imports_nothing_it_does_not_need() -> None:
    code = (
        "import sys; from cli.main import overview; overview();"
        "heavy = {'asyncio', 'http.client', 'tenacity', 'ssl', 'argparse', 'bus', 'services', 'httpx', 'starlette'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_client_uses_nothing_of_the_services() -> None:
    code = (
        "import sys, cli.policies, cli.main;"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('bus', 'services', 'compose', 'httpx')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_flags_beat_the_environment_which_beats_the_file(bare: Run, home: Path, standing_server: PolicyServer) -> None:
    token = home / "token"
    token.write_text(f"bearer {ADMIN_TOKEN}\n")
    file = home / ".config" / "silkbus" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"api": "http://127.0.0.1:9", "token": "stale"}))
    good = ["--api", standing_server.url, "--token-file", str(token)]
    assert bare("network-policies", *good, **WRONG_TOKEN, SILKBUS_API="ftp://x").code == 0
    assert bare("network-policies", SILKBUS_API=standing_server.url, SILKBUS_TOKEN_FILE=str(token)).code == 0
    file.write_text(json.dumps({"api": standing_server.url, "token_file": str(token)}))
    assert bare("network-policies").code == 0


def test_what_is_wrong_with_the_configuration_is_said(bare: Run, home: Path) -> None:
    file = home / ".config" / "silkbus" / "config.json"
    text = (
        f'No API endpoint set. Log in with `cf login`, or use --api URL, set SILKBUS_API, or put "api" into {file}.\n'
    )
    assert bare("network-policies").err == text
    assert "must be an http:// or https:// URL, not 'x'" in bare("network-policies", "--api", "x").err
    assert bare("network-policies", "--api", "http://x").err.startswith("Not logged in. Log in with `cf login`")
    result = bare("network-policies", "--api", "http://x", "--token-file", "/nothing")
    assert "The token file /nothing cannot be read" in result.err
    file.parent.mkdir(parents=True)
    for text, problem in [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"apis": "x"}', "apis: no such key"),
        ('{"api": 5}', "api: must be text"),
    ]:
        file.write_text(text)
        result = bare("network-policies")
        assert result.code == 1
        assert str(file) in result.err
        assert problem in result.err


def test_what_is_wrong_with_the_directory_is_said(bare: Run, home: Path) -> None:
    path = home / "apps"
    flags = ["--api", "http://127.0.0.1:9", "--directory", str(path)]
    for text, problem in [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("{}", "must look like"),
        ('{"apps": [{"guid": "", "name": "a", "space": "s", "org": "o"}]}', "guid must be a text that is not empty"),
    ]:
        if text is not None:
            path.write_text(text)
        result = bare("network-policies", *flags, **WRONG_TOKEN)
        assert result.code == 1
        assert f"The directory {path} " in result.err
        assert problem in result.err


def on_terminal(environment: dict[str, str], *arguments: str) -> str:
    """What silkbus prints when its output is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([PROGRAM, *arguments], env={**os.environ, **environment}, stdout=theirs) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not part:
                break
            output += part
        assert process.wait(60) == 0
    os.close(ours)
    return output.decode().replace("\r\n", "\n")


def test_colours_on_a_terminal_only_and_only_if_wanted(environment: dict[str, str]) -> None:
    wanted = {**environment, "TERM": "xterm", "NO_COLOR": ""}
    assert on_terminal(wanted, "add-network-policy", "front", "back") == (
        "Adding network policy from app \x1b[36;1mfront\x1b[0m to app \x1b[36;1mback\x1b[0m"
        " in org \x1b[36;1macme\x1b[0m / space \x1b[36;1mdev\x1b[0m...\n\x1b[32;1mOK\x1b[0m\n\n"
    )
    assert "\x1b[1msource\x1b[0m   \x1b[1mdestination\x1b[0m   " in on_terminal(wanted, "network-policies")
    assert "\x1b" not in on_terminal({**wanted, "NO_COLOR": "1"}, "network-policies")
    assert "\x1b" not in on_terminal({**wanted, "TERM": "dumb"}, "network-policies")


def test_a_reader_that_has_had_enough_is_no_error(environment: dict[str, str]) -> None:
    command = f"'{PROGRAM}' network-policies | true"
    done = subprocess.run(["bash", "-c", command], env={**os.environ, **environment}, capture_output=True, check=False)
    assert done.stderr == b""


def test_a_terminal_that_lacks_a_character(silkbus: Run, home: Path) -> None:
    apps = [{"guid": "g", "name": "caf\u00e9", "space": "dev", "org": "acme"}]
    (home / "apps.json").write_text(json.dumps({"apps": apps}, ensure_ascii=False), encoding="utf-8")
    narrow = {"PYTHONIOENCODING": "ascii", "SILKBUS_DIRECTORY": str(home / "apps.json")}
    assert silkbus("--help", **narrow).out.startswith("Usage: silkbus COMMAND [ARGUMENT\\u2026]")
    result = silkbus("network-policies", "--source", "caf\u00e9", **narrow)
    assert result.out.startswith("Listing network policies of app caf\\xe9"), result.err


def test_it_says_which_version_it_is(bare: Run) -> None:
    for asked in ("--version", "version"):
        assert bare(asked) == Result(0, f"silkbus {version('silkbus')}\n", "")


def test_https_where_http_is_spoken_is_said(silkbus: Run, environment: dict[str, str]) -> None:
    result = silkbus("network-policies", "--api", environment["SILKBUS_API"].replace("http:", "https:"))
    assert result.code == 1
    assert "It does not seem to speak TLS: is it http://?" in result.err
