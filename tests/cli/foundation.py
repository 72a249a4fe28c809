"""A stand-in Cloud Foundry for the command line: Cloud Controller and UAA, before a real policy server.

The Cloud Controller answers as its API v3 does, as far as commands ask it; the UAA renews tokens, as the client `cf`.
"""

import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.policy.server import PolicyServer
from tests.policy.stubs import Stub, Uaa, _form

CF = "Basic " + base64.b64encode(b"cf:").decode()


class CfUaa(Uaa):
    """Renews tokens, each refresh token once. `made` makes the new access token."""

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(tls)
        self.refresh_tokens = {"refresh-0"}
        self.made: Callable[[], str] = lambda: self.token("network.admin", user_name="admin")
        self.forms: list[tuple[str, dict[str, str]]] = []

    async def answer(self, request: Request) -> Response:
        if request.url.path != "/oauth/token":
            return await super().answer(request)
        form = await _form(request)
        self.forms.append((request.headers.get("authorization", ""), form))
        answer = {"access_token": self.made(), "token_type": "bearer", "expires_in": 600}
        if form["grant_type"] == "refresh_token":
            if form["refresh_token"] not in self.refresh_tokens:
                return JSONResponse({"error": "invalid_token", "error_description": "Invalid refresh token"}, 401)
            self.refresh_tokens.remove(form["refresh_token"])
            self.refresh_tokens.add(token := f"refresh-{len(self.forms)}")
            answer["refresh_token"] = token
        return JSONResponse(answer)


class Controller(Stub):
    """Orgs, spaces and apps by their GUIDs; each is its name, and what it lies in. Pages have 50 unless asked."""

    def __init__(self, uaa: Uaa, policy_server: str, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(tls)
        self.uaa = uaa
        self.links: dict[str, Any] = {
            "cloud_controller_v3": {"href": f"{self.url}/v3"},
            "network_policy_v1": {"href": f"{policy_server}/networking/v1/external"},
            "cloud_controller_v2": None,
        }
        self.orgs = {"org-1": "acme", "org-2": "other"}
        self.spaces = {"space-1": ("dev", "org-1"), "space-2": ("prod", "org-1"), "space-3": ("dev", "org-2")}
        self.apps = {
            "guid-front": ("front", "space-1"),
            "guid-back": ("back", "space-1"),
            "guid-db": ("db", "space-2"),
            "guid-far": ("far", "space-3"),
        }

    async def answer(self, request: Request) -> Response:
        if request.url.path == "/":
            return JSONResponse({"links": self.links})
        token = request.headers.get("authorization", "").removeprefix("bearer ")
        try:
            key = self.uaa.keys["key-1"].public_key()
            jwt.decode(token, key, algorithms=["RS256"], options={"verify_aud": False})
            refused = token in self.uaa.revoked
        except jwt.PyJWTError:
            refused = True
        if refused:
            error = {"code": 1000, "title": "CF-InvalidAuthToken", "detail": "Invalid Auth Token"}
            return JSONResponse({"errors": [error]}, 401)
        match request.url.path:
            case "/v3/organizations":
                rows = [(guid, name, "", {}) for guid, name in self.orgs.items()]
            case "/v3/spaces":
                rows = [(guid, name, org, _lies("organization", org)) for guid, (name, org) in self.spaces.items()]
            case "/v3/apps":
                rows = [(guid, name, space, _lies("space", space)) for guid, (name, space) in self.apps.items()]
            case _:
                error = {"code": 10000, "title": "CF-NotFound", "detail": "Unknown request"}
                return JSONResponse({"errors": [error]}, 404)
        return self._page(request, [row for row in rows if self._wanted(request, *row[:3])])

    def _wanted(self, request: Request, guid: str, name: str, place: str) -> bool:
        query = request.query_params
        asked = {"guids": guid, "names": name, "space_guids": place, "organization_guids": place}
        if request.url.path == "/v3/apps" and "organization_guids" in query:
            asked["organization_guids"] = self.spaces[place][1]
        for parameter, value in asked.items():
            if parameter in query and value not in query[parameter].split(","):
                return False
        return True

    def _page(self, request: Request, rows: Sequence[tuple[str, str, str, dict[str, Any]]]) -> Response:
        size, page = int(request.query_params.get("per_page", 50)), int(request.query_params.get("page", 1))
        shown = rows[(page - 1) * size : page * size]
        return JSONResponse(
            {
                "pagination": {"total_results": len(rows), "total_pages": max(1, -(-len(rows) // size)), "next": None},
                "resources": [{"guid": row[0], "name": row[1], "relationships": row[3]} for row in shown],
            }
        )


def _lies(kind: str, guid: str) -> dict[str, Any]:
    return {kind: {"data": {"guid": guid}}}


@dataclass
class Foundation:
    """A policy server that asks the UAA, and the Cloud Controller; `authority` is that of their certificates."""

    server: PolicyServer
    uaa: CfUaa
    controller: Controller
    authority: Path

    @property
    def token(self) -> str:
        return self.uaa.token("network.admin", user_name="admin")

    def asked(self) -> list[str]:
        """What the Cloud Controller was asked for, from now on forgotten."""
        found = [str(request.url).removeprefix(self.controller.url) for request in self.controller.asked]
        self.controller.asked.clear()
        return found


def login(home: Path, controller: Controller, token: str, **more: Any) -> Path:
    """Log in with cf, targeting org acme and space dev; its file. `more` are keys of the file, None to leave out."""
    content = {
        "AccessToken": f"bearer {token}",
        "APIVersion": "3.99.0",
        "NetworkPolicyV1Endpoint": controller.links["network_policy_v1"]["href"],
        "OrganizationFields": {"GUID": "org-1", "Name": "acme"},
        "PluginRepos": [{"Name": "CF-Community", "URL": "https://plugins.cloudfoundry.org"}],
        "RefreshToken": "refresh-0",
        "SpaceFields": {"GUID": "space-1", "Name": "dev", "AllowSSH": True},
        "SSLDisabled": False,
        "Target": controller.url,
        "UaaEndpoint": controller.uaa.url,
        "UAAGrantType": "",
        "UAAOAuthClient": "cf",
        "UAAOAuthClientSecret": "",
        **more,
    }
    file = home / ".cf" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2))
    file.chmod(0o600)
    return file


def old_token(uaa: Uaa, **claims: Any) -> str:
    """A token that has expired."""
    return uaa.token("network.admin", user_name="admin", exp=int(time.time()) - 60, **claims)
