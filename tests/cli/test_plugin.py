"""The cf CLI plugin, as cf runs it: one file, copied under another name, before stand-ins of cf (contract/policy.md 7).

The cf CLI itself is not here: what it says is recorded, or said by `tests.cli.fake_cf`.
"""

import importlib.util
import os
import pty
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.errors import Failed
from cli.main import COMMANDS
from cli.plugin import commands
from cli.plugin.build import build
from cli.plugin.rpc import METADATA, STRINGS, Cf, CfError
from tests.cli.conftest import Result
from tests.cli.fake_cf import FakeCf, RecordedCf, Server
from tests.cli.foundation import Foundation
from tests.cli.test_gob import decoded, recorded
from tests.policy.server import POLICIES

CORE = {"add-network-policy", "remove-network-policy", "network-policies", "apply-manifest", "events", "api", "apps"}
Plugin = Callable[..., Result]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's file as cf copies it: alone in a folder, under a name without an end."""
    folder = tmp_path_factory.mktemp("plugin")
    build(folder / "silkbus.pyz")
    home = tmp_path_factory.mktemp("plugins")
    return Path(shutil.copy(folder / "silkbus.pyz", home / "silkbus"))


@pytest.fixture
def plugin(installed: Path, home: Path, tmp_path: Path) -> Plugin:
    """Runs the plugin without the libraries that are installed here, nor our sources."""

    def run(*arguments: str, **environment: str) -> Result:
        command = [sys.executable, "-I", "-S", str(installed), *arguments]
        kept = {"HOME": str(home), "PATH": os.environ["PATH"], **environment}
        done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def cf(place: Foundation) -> Iterator[FakeCf]:
    """cf that is logged in to the foundation, and has org acme and space dev for its target."""
    answers = {
        "ApiEndpoint": place.controller.url,
        "IsSSLDisabled": True,
        "IsLoggedIn": True,
        "AccessToken": f"bearer {place.token}",
        "Username": "admin",
        "GetCurrentOrg": {"OrganizationFields": {"Guid": "org-1", "Name": "acme", "QuotaDefinition": {}}},
        "GetCurrentSpace": {"SpaceFields": {"Guid": "space-1", "Name": "dev"}},
    }
    with FakeCf(answers) as server:
        yield server


def test_the_file_is_one_that_cf_can_run(installed: Path, tmp_path: Path) -> None:
    assert installed.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.access(installed, os.X_OK)
    with zipfile.ZipFile(installed) as archive:
        names = archive.namelist()
    assert [name for name in names if name.endswith((".so", ".pyd", ".dll"))] == []
    modules = [name for name in names if name.endswith(".py") and name != "__main__.py"]
    assert {name + "c" for name in modules} <= set(names)
    build(tmp_path / "again.pyz")
    assert (tmp_path / "again.pyz").read_bytes() == installed.read_bytes()
    done = subprocess.run([str(installed)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "This cf CLI plugin is not intended to be run on its own\n\n")


@pytest.mark.parametrize("spoiled", [".pyc", ".py"])
def test_each_form_of_a_module_will_do(installed: Path, tmp_path: Path, spoiled: str) -> None:
    """What was compiled for another version of Python is passed over; if it is for this one, no source is read."""
    other = tmp_path / "other.pyz"
    with zipfile.ZipFile(installed) as archive, zipfile.ZipFile(other, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(".pyc"):
                assert content.startswith(importlib.util.MAGIC_NUMBER)
            if name.endswith(spoiled) and name != "__main__.py":
                content = b"\0\0\r\n" + content[4:]
            copy.writestr(name, content)
    command = [sys.executable, "-I", "-S", str(other), "network-policies", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: silkbus network-policies")


def test_installing_tells_cf_what_there_is(plugin: Plugin) -> None:
    with FakeCf({}) as cf:
        assert plugin(str(cf.port), "SendMetadata") == Result(0, "", "")
    metadata = cf.argument("SetPluginMetadata")
    assert metadata["Name"] == "silkbus"
    assert metadata["MinCliVersion"] == {"Major": 6, "Minor": 15}
    found = {command["Name"]: command for command in metadata["Commands"]}
    assert found["allow-access"] == {
        "Name": "allow-access",
        "HelpText": "Allow direct network traffic from one app to another",
        "UsageDetails": {
            "Usage": "cf allow-access SOURCE_APP DESTINATION_APP --protocol <tcp|udp> --port <1-65535>[-<1-65535>]",
            "Options": {
                "-protocol": "Protocol to connect apps with. (required)",
                "-port": "Port(s) to connect to destination app with. (required)",
            },
        },
    }
    assert found["list-access"]["UsageDetails"]["Usage"] == "cf list-access [--app appName]"
    assert not CORE & set(found)
    assert {name.removeprefix("silkbus-") for name in found} == set(COMMANDS) - set(commands.NOT_HERE)
    usage = found["silkbus-network-policies"]["UsageDetails"]["Usage"]
    assert usage.startswith("cf silkbus-network-policies [-h]")
    assert "\n     cf silkbus-network-policies --source frontend\n" in usage
    for command in found.values():
        assert command["UsageDetails"]["Usage"].startswith(f"cf {command['Name']}")
        assert "  silkbus " not in command["UsageDetails"]["Usage"]


def test_access_through_cf(plugin: Plugin, cf: FakeCf, place: Foundation) -> None:
    port = str(cf.port)
    flags = ("front", "back", "--protocol", "tcp", "--port", "8080-8090")
    assert plugin(port, "allow-access", *flags) == Result(
        0, "Allowing traffic from front to back as admin...\nOK\n\n\n", ""
    )
    listed = "Source\tDestination\tProtocol\tPorts\nfront\tback\t\ttcp\t\t8080-8090\n"
    assert plugin(port, "list-access") == Result(0, f"Listing policies as admin...\nOK\n\n{listed}", "")
    with place.server.client(place.token) as client:
        assert client.get(POLICIES).json()["total_policies"] == 1
    assert plugin(port, "remove-access", *flags).out == "Denying traffic from front to back as admin...\nOK\n\n\n"
    assert plugin(port, "deny-access", *flags).code == 0
    assert plugin(port, "list-access").out.endswith("Ports\n\n")
    assert cf.argument("IsMinCliVersion") == "6.15.0"


def test_the_newer_commands_through_cf(plugin: Plugin, cf: FakeCf) -> None:
    port = str(cf.port)
    # What silkbus by itself would use does not matter here.
    elsewhere = {"SILKBUS_API": "http://127.0.0.1:9", "SILKBUS_TOKEN": "x"}
    result = plugin(port, "silkbus-add-network-policy", "front", "db", "-s", "prod", **elsewhere)
    assert result.out == (
        "Adding network policy from app front in org acme / space dev to app db in org acme / space prod as admin...\n"
        "OK\n\n"
    )
    result = plugin(port, "silkbus-network-policies", "-o", "yaml")
    assert result.out.startswith("- source:\n    guid: guid-front\n    name: front\n"), result.err
    result = plugin(port, "silkbus-add-network-policy", "front")
    assert result.code == 2
    assert "usage: cf silkbus-add-network-policy " in result.err


def test_wrong_usage_is_explained_by_cf(plugin: Plugin, cf: FakeCf) -> None:
    help_text = ["NAME:", "   allow-access - Allow direct network traffic"]
    cf.answers |= {"DisableTerminalOutput": True, "CallCoreCommand": True, "GetOutputAndReset": help_text}
    result = plugin(str(cf.port), "allow-access", "front")
    assert result.out == "FAILED\nIncorrect usage. \n\n" + "\n".join(help_text) + "\n"
    assert result.code != 0
    assert [call for call in cf.calls if call[0] in cf.answers][-3:] == [
        ("DisableTerminalOutput", True),
        ("CallCoreCommand", ["help", "allow-access"]),
        ("GetOutputAndReset", True),
    ]
    cf.answers["CallCoreCommand"] = ValueError("no such command")
    result = plugin(str(cf.port), "allow-access", "front")
    assert result.out.endswith("\n\ncf cli error: no such command\n")


def failed(result: Result, text: str) -> None:
    assert (result.code, result.out.replace("\n\n", "\n")) == (1, f"FAILED\n{text}\n")


def test_what_cf_refuses_is_said(plugin: Plugin, cf: FakeCf) -> None:
    port, list_access = str(cf.port), "list-access"
    cf.answers["AccessToken"] = ValueError("the token is stale")
    result = plugin(port, list_access)
    assert result.out.endswith("FAILED\ngetting policies: getting access token: the token is stale\n")
    cf.answers["IsLoggedIn"] = False
    failed(plugin(port, list_access), "Not logged in. Use `cf login` to log in.")
    cf.answers["ApiEndpoint"] = ""
    failed(plugin(port, list_access), "No API endpoint set. Use `cf login` or `cf api` to target an endpoint.")
    cf.answers["ApiEndpoint"] = ValueError("broken")
    failed(plugin(port, list_access), "getting api endpoint: broken")
    failed(plugin(port, "no-access"), "The plugin silkbus has no command no-access. `cf plugins` lists those it has.")
    cf.answers["IsMinCliVersion"] = False
    result = plugin(port, list_access)
    assert result == Result(0, "Minimum CLI version 6.15.0 is required to run this plugin command\n\n", "")


def test_uninstalling_does_nothing(plugin: Plugin, cf: FakeCf) -> None:
    assert plugin(str(cf.port), "CLI-MESSAGE-UNINSTALL") == Result(0, "OK\n\n", "")
    assert [name for name, _ in cf.calls] == ["IsMinCliVersion"]


def test_cf_that_does_not_listen(plugin: Plugin) -> None:
    result = plugin("9", "list-access")
    assert result.code == 1
    assert "cf does not listen to its plugin at 127.0.0.1:9: [Errno 111] Connection refused" in result.out


def test_colours_on_a_terminal(installed: Path, cf: FakeCf, home: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "xterm"}
    done = subprocess.run(
        [installed, str(cf.port), "list-access"], env=environment, stdout=theirs, timeout=60, check=True
    )
    assert done.returncode == 0
    os.close(theirs)
    shown = os.read(ours, 65536).decode().replace("\r\n", "\n")
    os.close(ours)
    assert shown == (
        "Listing policies as \x1b[36;1madmin\x1b[0m...\n\x1b[32;1mOK\n\x1b[0m\n"
        "\x1b[;1mSource\tDestination\tProtocol\tPorts\n\x1b[0m\n"
    )


def test_the_same_file_is_silkbus_itself(plugin: Plugin) -> None:
    result = plugin("--help")
    assert result.code == 0
    assert result.out.startswith("Usage: silkbus COMMAND")
    assert "No API endpoint set" in plugin("network-policies").err


def test_the_calls_are_those_of_a_plugin_in_go() -> None:
    """Byte for byte: anything else the stand-in does not answer."""
    with RecordedCf() as server:
        cf = Cf(server.port)
        assert cf.text("AccessToken").startswith("bearer ey")
        assert cf.text("ApiEndpoint") == "http://127.0.0.1:18181"
        assert cf.call("GetCurrentSpace") == {"SpaceFields": {"Guid": "space-guid-1", "Name": "dev"}}
        assert cf.call("GetCurrentOrg")["OrganizationFields"]["Name"] == "myorg"
        assert cf.text("Username") == "admin"
        assert cf.call("IsLoggedIn") is True
        assert cf.call("IsSSLDisabled") is True
        assert cf.command("curl", "/networking/v1/external/policies")[:2] == ["{", '   "total_policies": 1,']
        with pytest.raises(CfError, match="Incorrect usage: 0 arguments of 1 required"):
            cf.command("curl")
        with pytest.raises(CfError, match="Server error, status code: 404"):
            cf.call("GetApp", argument="app-a")
        with pytest.raises(Failed, match="does not answer"):
            cf.call("GetApps", STRINGS, ["never", "recorded"])
        (problem,) = server.problems
        assert "no plugin sent" in str(problem)
        server.problems.clear()


def test_the_recorded_metadata_was_answered() -> None:
    _, metadata = decoded(recorded("plugin->cf")[0])
    with RecordedCf() as server:
        assert Cf(server.port).call("SetPluginMetadata", METADATA, metadata) is True


@pytest.mark.parametrize("answer", [b"", b"\x03", b"\xff" * 40, bytes.fromhex("03020001") * 2])
def test_nonsense_from_cf_is_a_failure(answer: bytes) -> None:
    class Nonsense(Server):
        def serve(self, connection: Any) -> None:
            connection.recv(65536)
            connection.sendall(answer)

    with Nonsense() as server, pytest.raises(Failed, match=r"cf (does not answer|answered another)"):
        Cf(server.port).text("ApiEndpoint")
