"""What the host's own network configuration is: read, never changed; a lab must leave it as it found it."""

import json
import shutil
from typing import Any

from compose.lab.namespaces import run

COMMANDS = (
    ["ip", "-j", "addr"],
    ["ip", "-j", "route", "show", "table", "all"],
    ["ip", "-j", "-6", "route", "show", "table", "all"],
    ["ip", "-j", "rule"],
    ["ip", "-j", "-6", "rule"],
    ["iptables-legacy-save"],
    ["ip6tables-legacy-save"],
    ["iptables-nft-save"],
    ["ip6tables-nft-save"],
    ["ipset", "list", "-n"],
)

# These count down by themselves.
VOLATILE = frozenset({"valid_life_time", "preferred_life_time", "expires"})


def snapshot() -> dict[str, Any]:
    """Addresses, routes, routing rules, iptables of both kinds and the names of the ipsets: command -> what it says.

    Commands that this machine lacks are left out.
    """
    seen: dict[str, Any] = {}
    for command in COMMANDS:
        if shutil.which(command[0]) is not None:
            text = run(command)
            seen[" ".join(command)] = _stable(json.loads(text or "[]")) if "-j" in command else _rules(text)
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The commands whose answers differ, each with both answers."""
    return [
        f"{name}: before {before[name]}, after {after.get(name)}" for name in before if before[name] != after.get(name)
    ]


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _rules(text: str) -> list[str]:
    """The lines of a save without its comments (which have the time) and without counters."""
    return [line.partition(" [")[0] for line in text.splitlines() if not line.startswith("#")]
