"""Where the API is, who asks, and which apps are known.

Flags beat the environment, that the login of cf, and that the file ~/.config/silkbus/config.json (or
$XDG_CONFIG_HOME/silkbus/config.json), a JSON object with the keys of `KEYS`. A key KEY is also the variable
SILKBUS_KEY. A token given at one place beats a token file given at a later one.

The token of cf goes nowhere but to the API that cf logged in to: with another API given by flag or environment, the
login of cf counts as absent.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cli import cf_login
from cli.errors import Failed
from cli.login import FixedToken, Login

KEYS = ("api", "token", "token_file", "directory", "org", "space", "skip_ssl_validation")


class CloudFoundry(Login, Protocol):
    """A login of cf: by its file, or through cf itself when we are its plugin."""

    @property
    def api(self) -> str: ...

    @property
    def policy_api(self) -> str: ...

    @property
    def skip_ssl_validation(self) -> bool: ...

    def targeted(self, kind: str) -> tuple[str, str] | None: ...


@dataclass(frozen=True, slots=True)
class Configuration:
    """`org` and `space` are the names of those targeted, if any. `cf` is set when `api` is what cf logged in to."""

    api: str
    login: Login
    directory: Path | None
    org: str | None
    space: str | None
    skip_ssl_validation: bool
    cf: CloudFoundry | None


find_cloud_foundry: Callable[[], CloudFoundry | None] = cf_login.read
"""How the login of cf is found; the plugin asks cf instead."""


def load(flags: Mapping[str, str | None]) -> Configuration:
    """The configuration; `flags` are the values given on the command line, by key. Raises Failed."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    file = folder / "silkbus" / "config.json"
    sources: list[dict[str, str | None]] = [
        {key: flags.get(key) for key in KEYS},
        {key: os.environ.get(f"SILKBUS_{key.upper()}") for key in KEYS},
    ]
    given = _value(sources, "api")
    # With all of it given, a login of cf that cannot be read is no concern of ours.
    cf = None if given and _token(sources) else find_cloud_foundry()
    if cf is not None and given is not None and given.rstrip("/") != cf.api:
        cf = None
    sources.append(_read(file) if cf is None else _of_cf(cf))
    token = _token(sources)
    api = _value(sources, "api")
    if api is None:
        raise Failed(
            f'No API endpoint set. Log in with `cf login`, or use --api URL, set SILKBUS_API, or put "api" into {file}.'
        )
    if not api.startswith(("http://", "https://")):
        raise Failed(f"The API endpoint must be an http:// or https:// URL, not {api!r}.")
    login = cf if token is None else FixedToken(token)
    if login is None:
        raise Failed(
            "Not logged in. Log in with `cf login`, or set SILKBUS_TOKEN or SILKBUS_TOKEN_FILE, "
            f'or put "token" into {file}.'
        )
    directory = _value(sources, "directory")
    return Configuration(
        api=api.rstrip("/"),
        login=login,
        directory=Path(directory) if directory else None,
        org=_value(sources, "org"),
        space=_value(sources, "space"),
        skip_ssl_validation=_truth(_value(sources, "skip_ssl_validation")),
        cf=cf,
    )


def _of_cf(cf: CloudFoundry) -> dict[str, str | None]:
    org, space = cf.targeted("Organization"), cf.targeted("Space")
    return {
        "api": cf.api,
        "org": org and org[1],
        "space": space and space[1],
        "skip_ssl_validation": "true" if cf.skip_ssl_validation else None,
    }


def _value(sources: list[dict[str, str | None]], key: str) -> str | None:
    return next((source[key] for source in sources if source.get(key)), None)


def _truth(text: str | None) -> bool:
    if text not in (None, "true", "false"):
        raise Failed(f"skip_ssl_validation must be true or false, not {text!r}")
    return text == "true"


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
        content = json.loads(file.read_text(encoding="utf-8"))
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
