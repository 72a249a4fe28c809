"""Writes docs/settings.md from the settings dataclasses: `make docs`. A test holds that the file is what this makes.

It is with the tests because it must know all services, which no part of the product may.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from bus.settings import CellSettings, CentralSettings, ServiceSettings
from services.doctor.settings import DoctorSettings
from services.enforcer.settings import EnforcerSettings
from services.networker.agent import NetworkerSettings
from services.policy.internal_settings import InternalSettings
from services.policy.settings import PolicySettings
from services.silk.controller_settings import ControllerSettings
from services.silk.settings import WorkerSettings

TARGET = Path(__file__).parents[2] / "docs" / "settings.md"

SHARED = (ServiceSettings, CentralSettings, CellSettings)
SECTIONS: tuple[tuple[type[Any], str, str], ...] = (
    (ServiceSettings, "Every service", ""),
    (CentralSettings, "Central services", "Policy servers and Silk controllers, besides those of every service."),
    (CellSettings, "Services of a cell", "Silk worker, enforcer, networker, besides those of every service."),
    (
        PolicySettings,
        "Policy server",
        "`silkbus-policy-server`; more in [authority](authority.md), [upkeep](upkeep.md).",
    ),
    (InternalSettings, "Internal API", "`silkbus-policy-server-internal`; more in [agents](agents.md)."),
    (ControllerSettings, "Silk controller", "`silkbus-silk-controller`; more in [leases](leases.md)."),
    (WorkerSettings, "Silk worker", "`silkbus-silk-worker`; more in [the overlay on a cell](silk.md)."),
    (EnforcerSettings, "Enforcer", "`silkbus-enforcer`; more in [egress](egress.md), [traffic](traffic.md)."),
    (NetworkerSettings, "Networker", "`silkbus-networker`; more in [the networker](networker.md)."),
    (DoctorSettings, "Doctor", "`silkbus doctor`, which takes what it shares with the cell's services from theirs."),
)

HEAD = """# Every setting

<!-- Written by `make docs` from the code; changes here are lost. -->

A setting is a key of the JSON file that `--config FILE` names, or the variable `SILKBUS_` and its name in capitals,
which has precedence: `log_level` is `SILKBUS_LOG_LEVEL`. A list is a JSON list, or text with commas. Whatever is wrong
with them is said at the start, all of it, and the service ends with 2. `--help` of a service prints its settings. What
the command line reads besides is in [the command line](cli.md#where-the-api-is-and-who-asks).
"""


def kind(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        (hint,) = (option for option in hint.__args__ if option is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return f"list of {kind(hint.__args__[0])}s"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(hint) or {"IPv4Address": "address", "IPv4Network": "network"}[hint.__name__]


def default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "**required**"
    if value in (None, (), ""):
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def section(settings: type[Any], title: str, text: str) -> str:
    known = {f.name for each in SHARED if settings is not each and issubclass(settings, each) for f in _fields(each)}
    hints = typing.get_type_hints(settings)
    rows = [
        " | ".join((f"| `{f.name}`", _cell(f.metadata["help"]), kind(hints[f.name]), f"{default(f.default)} |"))
        for f in _fields(settings)
        if f.name not in known
    ]
    table = ["| setting | | kind | default |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {title}", "", *([text, ""] if text else []), *table, ""])


def _cell(text: str) -> str:
    """Text within a table's cell, where a bar would end it."""
    return text.replace("|", "\\|")


def _fields(settings: type[Any]) -> "tuple[dataclasses.Field[Any], ...]":
    return dataclasses.fields(settings)


def page() -> str:
    return "\n".join([HEAD, *(section(*each) for each in SECTIONS)])


if __name__ == "__main__":
    TARGET.write_text(page())
