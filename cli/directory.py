"""Which apps there are, for installations without a Cloud Controller: names, spaces and orgs from a file.

The file is JSON, `{"apps": [{"guid", "name", "space", "org"}]}`. Without one, an app is known by its GUID only.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cli.errors import Failed


@dataclass(frozen=True, slots=True)
class App:
    guid: str
    name: str
    space: str = ""
    org: str = ""


class Directory:
    """The apps of a file; `Directory(None)` knows none, and takes every name for a GUID."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.apps = [] if path is None else _read(path)
        self._by_guid = {app.guid: app for app in self.apps}

    def app(self, guid: str) -> App:
        """The app of this GUID. One that is not listed is shown by its GUID."""
        return self._by_guid.get(guid) or App(guid, guid)

    def within(self, org: str | None, space: str | None) -> list[App]:
        return [app for app in self.apps if space in (None, app.space) and org in (None, app.org)]

    def find(self, name: str, org: str | None = None, space: str | None = None) -> App:
        """The one app of this name, in this org and space if they are given, or of this GUID. Raises Failed."""
        if self.path is None:
            return App(name, name)
        found = [app for app in self.within(org, space) if app.name == name]
        if len(found) == 1:
            return found[0]
        if name in self._by_guid and not found:
            return self._by_guid[name]
        if not found:
            raise Failed(f"App '{name}' not found{_place(org, space)}. The apps are those of {self.path}.")
        raise Failed(
            f"App '{name}' is ambiguous: {_candidates(found)}. "
            "Give its GUID, or name its space with -s (the destination's) or SILKBUS_SPACE (the source's)."
        )


def _candidates(apps: Iterable[App]) -> str:
    return ", ".join(f"{app.guid} (org {app.org} / space {app.space})" for app in apps)


def _place(org: str | None, space: str | None) -> str:
    words = [f"{kind} {value}" for kind, value in (("org", org), ("space", space)) if value]
    return f" in {' / '.join(words)}" if words else ""


def _read(path: Path) -> list[App]:
    try:
        content = json.loads(path.read_text())
        apps = content["apps"]
        found = [App(*(_text(item, key) for key in ("guid", "name", "space", "org"))) for item in apps]
    except OSError as error:
        raise Failed(f"The directory {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise Failed(f"The directory {path} is not JSON: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise Failed(
            f'The directory {path} must look like {{"apps": [{{"guid", "name", "space", "org"}}]}}, all texts: {error}'
        ) from None
    return found


def _text(item: dict[str, object], key: str) -> str:
    value = item[key]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a text that is not empty, not {value!r}")
    return value
