"""Apps, spaces and their developers from a file, for installations without a Cloud Controller.

The file is JSON, `{"apps": [{"guid", "name", "space", "org"}], "spaces": [{"name", "org", "developers": ["user"]}]}`,
all texts: the same file that tells the `silkbus` command the apps' names. A developer is a token's subject: the user of
a token file, UAA's GUID of a user, or the id of a client; not UAA's user name, which two users may share.
"""

import json
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from bus.decode import Fields
from bus.messages import MAX_APP_ID, AppId
from services.policy.access import Space
from services.policy.identity import Unavailable
from services.policy.watched import WatchedFile


@dataclass(frozen=True, slots=True)
class _Content:
    apps: Mapping[AppId, Space]
    developed: Mapping[str, AbstractSet[Space]]


class Directory:
    """What the file says, as `services.policy.access.Spaces`. Raises Malformed when it cannot be used at start."""

    def __init__(self, path: Path) -> None:
        self._file: WatchedFile[_Content] = WatchedFile("directory", path, _decode)

    async def of_apps(self, apps: Collection[AppId]) -> Mapping[AppId, Space]:
        """The space of each of these apps; apps that are not in the file are left out. Raises Unavailable."""
        known = self._content().apps
        return {app: known[app] for app in apps if app in known}

    async def developed(self, subject: str, spaces: AbstractSet[Space]) -> AbstractSet[Space]:
        """In which of these spaces this user or client is a developer. Raises Unavailable."""
        return self._content().developed.get(subject, frozenset()) & spaces

    async def apps_of(self, subject: str, apps: Collection[AppId]) -> AbstractSet[AppId]:
        """Which of these apps lie in spaces in which this user or client is a developer. Raises Unavailable."""
        content = self._content()
        own = content.developed.get(subject, frozenset())
        return {app for app in apps if content.apps.get(app) in own}

    def _content(self) -> _Content:
        content = self._file.content()
        if content is None:
            raise Unavailable("the directory of apps and spaces cannot be read; the server's log says why")
        return content


def _decode(fields: Fields) -> _Content:
    apps = {}
    for index, item in enumerate(fields.items("apps")):
        app = Fields(item, f"{fields.where}: apps[{index}]")
        guid = AppId(app.text("guid", max_length=MAX_APP_ID))
        if guid in apps:
            raise app.malformed("guid", f"{guid!r} is there twice")
        apps[guid] = _space(app.text("org"), app.text("space"))
    developed: dict[str, set[Space]] = {}
    for index, item in enumerate(fields.items("spaces") if "spaces" in fields else ()):
        space = Fields(item, f"{fields.where}: spaces[{index}]")
        name = _space(space.text("org"), space.text("name"))
        developers = space.items("developers")
        if not all(isinstance(developer, str) and developer for developer in developers):
            raise space.malformed("developers", "must be a list of texts that are not empty")
        for developer in developers:
            developed.setdefault(developer, set()).add(name)
    return _Content(apps, developed)


def _space(org: str, name: str) -> Space:
    """Names of orgs are unique, those of spaces only within their org."""
    return Space(json.dumps([org, name]))
