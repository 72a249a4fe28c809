"""Runs a program of ours as the next minor version might be: `python -m tests.upgrade.next_version MODULE`.

It says version 1.1, and puts a field that nobody knows into each message, and into each lease that is asked about.
"""

import runpy
import sys
from collections.abc import Mapping
from typing import Any

from bus import wire

UNKNOWN = {"from_the_next_version": {"a": [1, None, b"\xff"]}}


def encode(message: Mapping[str, Any]) -> bytes:
    return wire.pack({"version": [wire.VERSION[0], wire.VERSION[1] + 1], **_extended(message), **UNKNOWN})


def _extended(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {**value, **UNKNOWN} if key == "lease" else value for key, value in message.items()}


def become() -> None:
    """From now on, this process speaks as the next version: before anything imports what it replaces."""
    loaded = [name for name in sys.modules if name.startswith(("bus.connection", "bus.tables", "services"))]
    assert loaded == [], f"too late: {loaded}"
    wire.encode = encode


if __name__ == "__main__":
    become()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
