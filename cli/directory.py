"""Which apps there are, for installations without a Cloud Controller: names, spaces and orgs from a file.

The file is JSON, `{"apps": [{"guid", "name", "space", "org"}]}`. Without one, an app is known by its GUID only.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from cli.apps import App, Place, place_text
from cli.errors import Failed, NotFound, WrongUsage


class NoNames(WrongUsage):
    """Names were given and nothing knows names."""

    def __init__(self) -> None:
        super().__init__(
            "names of apps, spaces and orgs need a directory of apps (--directory FILE, SILKBUS_DIRECTORY)"
            " or a login with cf; without them an app is its GUID"
        )


class Directory:
    """The apps of a file; `Directory(None)` knows none, and takes every name for a GUID. See `cli.apps.Apps`."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.apps = [] if path is None else _read(path)
        self._by_guid = {app.guid: app for app in self.apps}

    def known(self, guids: Iterable[str]) -> dict[str, App]:
        return {guid: self._by_guid.get(guid) or App(guid, guid) for guid in guids}

    def within(self, org: str | None, space: str | None) -> list[App]:
        return [app for app in self.apps if space in (None, app.space) and org in (None, app.org)]

    def find_all(self, wanted: Iterable[Place]) -> dict[Place, App]:
        if self.path is None:
            raise NoNames
        there: dict[Place, list[App]] = {}
        for app in self.apps:
            there.setdefault(Place(app.org, app.space, app.name), []).append(app)
        return {place: there[place][0] for place in wanted if len(there.get(place, ())) == 1}

    def find(self, name: str, org: str | None, space: str | None) -> App:
        if self.path is None:
            return App(name, name)
        found = [app for app in self.within(org, space) if app.name == name]
        if len(found) == 1:
            return found[0]
        if name in self._by_guid and not found:
            return self._by_guid[name]
        if not found:
            raise NotFound(f"App '{name}' not found{place_text(org, space)}. The apps are those of {self.path}.")
        raise Failed(
            f"App '{name}' is ambiguous: {_candidates(found)}. Give its GUID"
            + (
                f"; or leave only one of them in {self.path}."
                if len({(app.org, app.space) for app in found}) < len(found)
                else ", or name its space with -s (the destination's) or SILKBUS_SPACE (the source's)."
            )
        )


def _candidates(apps: Iterable[App]) -> str:
    return ", ".join(f"{app.guid} (org {app.org} / space {app.space})" for app in apps)


def _read(path: Path) -> list[App]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        apps = content["apps"]
        found = [App(*(_text(item, key) for key in ("guid", "name", "space", "org"))) for item in apps]
    except OSError as error:
        raise Failed(f"The directory {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError):
            raise Failed(f"The directory {path} is not JSON: {error}") from None
        raise _misshapen(path, error) from None
    except (KeyError, TypeError) as error:
        raise _misshapen(path, error) from None
    return found


def _misshapen(path: Path, error: Exception) -> Failed:
    return Failed(
        f'The directory {path} must look like {{"apps": [{{"guid", "name", "space", "org"}}]}}, all texts: {error}'
    )


def _text(item: dict[str, object], key: str) -> str:
    value = item[key]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a text that is not empty, not {value!r}")
    return value
