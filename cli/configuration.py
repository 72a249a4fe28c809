"""Where the API is, which token it gets, and which apps are known: from flags, environment or a file, in this order.

The file is ~/.config/silkbus/config.json (or $XDG_CONFIG_HOME/silkbus/config.json), a JSON object with the keys of
`KEYS`. A key KEY is also the variable SILKBUS_KEY. A token given at one place beats a token file given at a later one.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cli.errors import Failed

KEYS = ("api", "token", "token_file", "directory", "org", "space")


@dataclass(frozen=True, slots=True)
class Configuration:
    """`org` and `space` are the targeted ones, if any."""

    api: str
    token: str
    directory: Path | None
    org: str | None
    space: str | None


def load(flags: Mapping[str, str | None]) -> Configuration:
    """The configuration; `flags` are the values given on the command line, by key. Raises Failed."""
    file = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "silkbus" / "config.json"
    sources = [
        {key: flags.get(key) for key in KEYS},
        {key: os.environ.get(f"SILKBUS_{key.upper()}") for key in KEYS},
        _read(file),
    ]
    values = {key: next((source[key] for source in sources if source.get(key)), None) for key in KEYS}
    api = values["api"]
    if api is None:
        raise Failed(f'No API endpoint set. Use --api URL, set SILKBUS_API, or put "api" into {file}.')
    if not api.startswith(("http://", "https://")):
        raise Failed(f"The API endpoint must be an http:// or https:// URL, not {api!r}.")
    token = _token(sources)
    if token is None:
        raise Failed(f'Not logged in. Set SILKBUS_TOKEN or SILKBUS_TOKEN_FILE, or put "token" into {file}.')
    directory = values["directory"]
    return Configuration(api.rstrip("/"), token, Path(directory) if directory else None, values["org"], values["space"])


def _token(sources: list[dict[str, str | None]]) -> str | None:
    for source in sources:
        if token := source.get("token"):
            return token.strip()
        if path := source.get("token_file"):
            try:
                return Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise Failed(f"The token file {path} cannot be read: {error}") from None
    return None


def _read(file: Path) -> dict[str, str | None]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Failed(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Failed(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Failed(f"{file} must hold a JSON object with some of: {', '.join(KEYS)}")
    for key, value in content.items():
        if key not in KEYS:
            raise Failed(f"{file}: {key}: no such key; there are: {', '.join(KEYS)}")
        if value is not None and not isinstance(value, str):
            raise Failed(f"{file}: {key}: must be text")
    return content
