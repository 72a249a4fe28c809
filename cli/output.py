"""The results of commands: a table for people, JSON or YAML for programs, then nothing else on standard output."""

import json
from collections.abc import Sequence

from cli import terminal

FORMATS = ("table", "json", "yaml")


def write(form: str, value: object, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a result: `value` as JSON or YAML, or `rows` as a table."""
    if form == "table":
        terminal.table(header, rows)
    else:
        structured(form, value)


def structured(form: str, value: object) -> None:
    """Print `value`, which is made of what JSON knows, as JSON or YAML."""
    if form == "json":
        terminal.say(json.dumps(value, indent=2, ensure_ascii=False))
        return
    import yaml  # takes longer to import than all the rest

    terminal.say(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False).rstrip("\n"))
