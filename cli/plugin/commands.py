"""Which commands the plugin has, and what it tells cf of them when it is installed (contract/policy.md 6.1, 7.1).

The commands of the plugin of 2017 have its names. All others of silkbus that speak to the API are there as
`silkbus-NAME`, since cf refuses a plugin whose commands have the names of its own.
"""

import contextlib
import io
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cli import main

NAME = "silkbus"
LEAST_CF = (6, 15, 0)
"""The version of cf whose calls we need, as the plugin of 2017 asked for."""
PREFIX = "silkbus-"
LEGACY = ("allow-access", "remove-access", "deny-access", "list-access")
NOT_HERE = ("completion",)

_PORTS = "<1-65535>[-<1-65535>]"
_CHANGE = {
    "-protocol": "Protocol to connect apps with. (required)",
    "-port": "Port(s) to connect to destination app with. (required)",
}
_LIST = {"-app": "Application to filter results by. (optional)"}


def names() -> dict[str, str]:
    """The command of silkbus for each command of the plugin."""
    return {name if name in LEGACY else PREFIX + name: name for name in main.COMMANDS if name not in NOT_HERE}


def typed(command: str) -> str:
    """What is typed to call a command of silkbus."""
    return f"cf {command}" if command in LEGACY else f"cf {PREFIX}{command}"


def metadata() -> dict[str, Any]:
    """The value of `rpc.METADATA`."""
    return {
        "Name": NAME,
        "Version": _version(),
        "LibraryVersion": {},
        "MinCliVersion": dict(zip(("Major", "Minor", "Build"), LEAST_CF, strict=True)),
        "Commands": [
            {"Name": name, "Alias": "", "HelpText": main.COMMANDS[command][1], "UsageDetails": _usage(command)}
            for name, command in names().items()
        ],
    }


def _usage(command: str) -> dict[str, Any]:
    if command == "list-access":
        return {"Usage": f"cf {command} [--app appName]", "Options": _LIST}
    if command in LEGACY:
        change = f"cf {command} SOURCE_APP DESTINATION_APP --protocol <tcp|udp> --port {_PORTS}"
        return {"Usage": change, "Options": _CHANGE}
    # `--help` never reaches a plugin: cf shows what it was told here.
    text = io.StringIO()
    function = main.find(command)
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        if function is not None:
            function(["--help"])
    return {"Usage": text.getvalue().removeprefix("usage: ").rstrip("\n").replace("\n", "\n   "), "Options": {}}


def _version() -> dict[str, int]:
    try:
        numbers = [int(part) for part in version("silkbus").split(".")[:3]]
    except (PackageNotFoundError, ValueError):
        numbers = []
    return dict(zip(("Major", "Minor", "Build"), [*numbers, 0, 0, 0][:3], strict=True))
