"""Names and GUIDs as the Cloud Controller knows them, by its API v3, in as few requests as there can be.

Requests are those of the cf CLI. A list longer than one page of the server's default size is asked for again in large
pages, so that a space of a thousand apps costs two requests rather than twenty.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from cli.apps import App, Place, place_text
from cli.errors import Failed, NotFound
from cli.web import Server

BATCH = 150
"""GUIDs or names in one request's query: 8 KiB is what a request line may have at many servers."""
PAGE = 5000
"""What the API allows at most."""
_GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class CloudController:
    """See `cli.apps.Apps`. `server` is at the API's root."""

    def __init__(self, server: Server) -> None:
        self.server = server
        # What was looked up is not looked up again: a command lives for a second.
        self._orgs: dict[str, str] = {}
        self._spaces: dict[tuple[str, str], str] = {}
        self._apps: dict[str, App] = {}

    def remember(self, org: tuple[str, str] | None, space: tuple[str, str] | None) -> None:
        """GUID and name of the targeted org and space, which need not be asked for."""
        if org is not None:
            self._orgs[org[1]] = org[0]
            if space is not None:
                self._spaces[org[0], space[1]] = space[0]

    def find(self, name: str, org: str | None, space: str | None) -> App:
        if org is None or space is None:
            if _GUID.fullmatch(name):
                return self._by_guid(name)
            raise Failed(
                f"App '{name}' is not known: no org and space targeted. "
                "Use `cf target -o ORG -s SPACE`, or set SILKBUS_ORG and SILKBUS_SPACE."
            )
        place = Place(org, space, name)
        if (found := self.find_all([place]).get(place)) is not None:
            return found
        if _GUID.fullmatch(name):
            return self._by_guid(name)
        raise NotFound(f"App '{name}' not found{place_text(org, space)}.")

    def find_all(self, wanted: Iterable[Place]) -> dict[Place, App]:
        names: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for place in dict.fromkeys(wanted):
            names[place.org, place.space].append(place.name)
        found: dict[Place, App] = {}
        for (org, space), apps in names.items():
            guid = self._space(org, space)
            items = self._listed("apps", "names", apps, space_guids=guid)
            there = {_text(item, "name"): item for item in items}
            # On MySQL names are compared without regard to case.
            resembling = {name.casefold(): item for name, item in there.items()}
            for name in apps:
                if item := there.get(name) or resembling.get(name.casefold()):
                    app = App(_text(item, "guid"), _text(item, "name"), space, org)
                    found[Place(org, space, name)] = self._seen(app)
        return found

    def within(self, org: str | None, space: str | None) -> list[App]:
        if org is not None and space is not None:
            items = self._pages("/v3/apps", space_guids=self._space(org, space))
            return [self._seen(App(_text(item, "guid"), _text(item, "name"), space, org)) for item in items]
        filters = {} if org is None else {"organization_guids": self._org(org)}
        apps = self._placed(self._pages("/v3/apps", **filters)).values()
        return [app for app in apps if space in (None, app.space)]

    def known(self, guids: Iterable[str]) -> dict[str, App]:
        wanted = list(dict.fromkeys(guids))
        found = self._apps
        if any(guid not in found for guid in wanted):
            found = found | self._placed(self._listed("apps", "guids", wanted))
        return {guid: found.get(guid) or App(guid, guid) for guid in wanted}

    def _seen(self, app: App) -> App:
        self._apps[app.guid] = app
        return app

    def _by_guid(self, guid: str) -> App:
        found = self._placed(self._listed("apps", "guids", [guid]))
        if guid not in found:
            raise NotFound(f"App '{guid}' not found.")
        return found[guid]

    def _placed(self, items: Sequence[Any]) -> dict[str, App]:
        """Apps with the names of their spaces and orgs."""
        spaces = {_text(item, "guid"): _related(item, "space") for item in items}
        names, orgs = {}, {}
        for item in self._listed("spaces", "guids", list(dict.fromkeys(spaces.values()))):
            guid = _text(item, "guid")
            names[guid], orgs[guid] = _text(item, "name"), _related(item, "organization")
        org_items = self._listed("organizations", "guids", list(dict.fromkeys(orgs.values())))
        org_names = {_text(item, "guid"): _text(item, "name") for item in org_items}
        return {
            (guid := _text(item, "guid")): App(
                guid, _text(item, "name"), names.get(spaces[guid], ""), org_names.get(orgs.get(spaces[guid], ""), "")
            )
            for item in items
        }

    def _org(self, name: str) -> str:
        if name not in self._orgs:
            found = self._listed("organizations", "names", [name])
            if not found:
                raise Failed(f"Organization '{name}' not found, or you may not see it (`cf orgs` lists those you may).")
            self._orgs[name] = _text(found[0], "guid")
        return self._orgs[name]

    def _space(self, org: str, name: str) -> str:
        key = self._org(org), name
        if key not in self._spaces:
            found = self._listed("spaces", "names", [name], organization_guids=key[0])
            if not found:
                raise Failed(f"Space '{name}' not found in org '{org}', or you may not see it.")
            self._spaces[key] = _text(found[0], "guid")
        return self._spaces[key]

    def _listed(self, kind: str, by: str, values: Sequence[str], **filters: str) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(values), BATCH):
            # Commas separate values; one within a name has to be escaped twice.
            text = ",".join(value.replace(",", "%2C") for value in values[start : start + BATCH])
            found += self._pages(f"/v3/{kind}", **{by: text}, **filters)
        return found

    def _pages(self, path: str, **query: str) -> list[Any]:
        pages, found = self._page(path, query)
        if pages > 1:
            pages, found = self._page(path, {**query, "per_page": str(PAGE), "page": "1"})
            for number in range(2, pages + 1):
                found += self._page(path, {**query, "per_page": str(PAGE), "page": str(number)})[1]
        return found

    def _page(self, path: str, query: dict[str, str]) -> tuple[int, list[Any]]:
        asked = urlencode(query, quote_via=quote, safe="")
        answer = self.server.send("GET", f"{path}?{asked}" if asked else path)
        value = answer.json()
        if answer.status == 200:
            try:
                return int(value["pagination"]["total_pages"]), list(value["resources"])
            except (KeyError, TypeError, ValueError):
                pass
        raise Failed(f"The Cloud Controller at {self.server.url} answered GET {path}: {_problem(answer.status, value)}")


def _problem(status: int, value: Any) -> str:
    try:
        details = "; ".join(f"{error['title']}: {error['detail']}" for error in value["errors"])
    except (KeyError, TypeError):
        details = "and nothing that can be understood"
    advice = " Log in again: `cf login`." if status == 401 else ""
    return f"status {status}, {details}.{advice}"


def _text(item: Any, key: str) -> str:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, str):
        raise Failed(f"The Cloud Controller answered a resource without {key}: {str(item)[:200]}")
    return value


def _related(item: Any, kind: str) -> str:
    try:
        return str(item["relationships"][kind]["data"]["guid"])
    except (KeyError, TypeError):
        raise Failed(f"The Cloud Controller answered a resource without its {kind}: {str(item)[:200]}") from None
