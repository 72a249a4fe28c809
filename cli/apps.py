"""Names of apps and their GUIDs: what both `cli.directory` (a file) and `cli.cloud_controller` answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class App:
    """An app as people know it. One that is not known, or may not be seen, has its GUID for a name and no place."""

    guid: str
    name: str
    space: str = ""
    org: str = ""


class Place(NamedTuple):
    """An app's full name."""

    org: str
    space: str
    name: str


class Apps(Protocol):
    """Every method may raise Failed."""

    def find(self, name: str, org: str | None, space: str | None) -> App:
        """The one app of this name, in this org and space as far as they are given, or of this GUID."""

    def find_all(self, wanted: Iterable[Place]) -> dict[Place, App]:
        """Those of the apps that there are, once each, in as few requests as possible."""

    def within(self, org: str | None, space: str | None) -> list[App]:
        """The apps of a space, or of an org, or all."""

    def known(self, guids: Iterable[str]) -> Mapping[str, App]:
        """The apps of these GUIDs, an entry for each of them."""


def place_text(org: str | None, space: str | None) -> str:
    """` in org O / space S`, for a sentence; nothing if neither is known."""
    words = [f"{kind} {value}" for kind, value in (("org", org), ("space", space)) if value]
    return f" in {' / '.join(words)}" if words else ""
