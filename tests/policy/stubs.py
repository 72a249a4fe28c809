"""Stand-ins for UAA and the Cloud Controller: real HTTP, real TLS, real signatures, and faults at will.

They answer as those do, as far as the policy server asks; each runs in a thread of its own.
"""

import asyncio
import base64
import json
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import jwt
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.certificates import Authority
from services.policy.remote import Remote
from services.policy.uaa import OwnToken
from tests.nats_server import free_port

LOGIN = ("policy-server", "s3cret:&%")
ISSUER = "https://uaa.example.com/oauth/token"


class Stub(ABC):
    """One HTTP server. `fault`, while set, is what becomes of every request: hang, garbage, a list, or a status."""

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self.fault: str | int | None = None
        self.fault_headers: dict[str, str] = {}
        self.asked: list[Request] = []
        self._tls = tls
        self.clients: Path | None = None
        """The authority of the certificates that clients must have, with `tls`."""
        self._port = free_port()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def asked_for(self, path: str) -> list[Request]:
        return [request for request in self.asked if request.url.path == path]

    def start(self) -> None:
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])])
        config = uvicorn.Config(
            app,
            port=self._port,
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=0,
            ssl_certfile=self._tls[0] if self._tls else None,
            ssl_keyfile=self._tls[1] if self._tls else None,
            ssl_ca_certs=str(self.clients) if self.clients else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if self.clients else ssl.CERT_NONE,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(30)
            self._server = None

    async def _answer(self, request: Request) -> Response:
        await request.body()
        self.asked.append(request)
        match self.fault:
            case "hang":
                while self.fault == "hang":
                    if await request.is_disconnected():
                        break
                    await asyncio.sleep(0.05)
                return Response(status_code=500)
            case "garbage":
                return Response(b"<html>{", media_type="text/html")
            case "list":
                return JSONResponse([])
            case int(status):
                return JSONResponse({"error": "stub"}, status, headers=self.fault_headers)
        return await self.answer(request)

    @abstractmethod
    async def answer(self, request: Request) -> Response: ...


class Uaa(Stub):
    """`keys` are private keys by their ids; each kind of token is made by `token`."""

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(tls)
        self.keys: dict[str, Any] = {"key-1": RSA_KEYS[0]}
        self.opaque: dict[str, dict[str, Any]] = {}
        self.revoked: set[str] = set()
        self.own_tokens: set[str] = set()
        self.lasts = 43_200
        self.extra_keys: list[Any] = []

    def token(self, *scopes: str, kid: str = "key-1", key: Any = None, **claims: Any) -> str:
        """An access token as UAA signs it; `claims` replace or, as None, take away."""
        now = int(time.time())
        content = {
            "sub": "dev-guid",
            "user_name": "dev",
            "scope": list(scopes),
            "aud": ["cf", *{scope.partition(".")[0] for scope in scopes}],
            "iss": ISSUER,
            "iat": now,
            "exp": now + 600,
            "jti": "0a1b",
            **claims,
        }
        content = {name: value for name, value in content.items() if value is not None}
        key = key or self.keys[kid]
        return jwt.encode(content, key, algorithm=_algorithm(key), headers={"kid": kid})

    async def answer(self, request: Request) -> Response:
        match request.url.path:
            case "/token_keys":
                return JSONResponse({"keys": [*self.extra_keys, *(published(*item) for item in self.keys.items())]})
            case "/check_token":
                return self._logged_in(request) or await self._check(request)
            case "/oauth/token":
                return self._logged_in(request) or await self._issue(request)
        return JSONResponse({"error": "not_found"}, 404)

    def _logged_in(self, request: Request) -> Response | None:
        wanted = "Basic " + base64.b64encode(":".join(LOGIN).encode()).decode()
        if request.headers.get("authorization") == wanted:
            return None
        return JSONResponse({"error": "unauthorized", "error_description": "Bad credentials"}, 401)

    async def _check(self, request: Request) -> Response:
        token = (await _form(request)).get("token", "")
        try:
            if token in self.revoked:
                raise jwt.InvalidTokenError
            if token in self.opaque:
                return JSONResponse(self.opaque[token])
            key = self.keys[jwt.get_unverified_header(token)["kid"]]
            options: Any = {"verify_aud": False}
            claims = jwt.decode(token, key.public_key(), algorithms=[_algorithm(key)], options=options)
        except (jwt.PyJWTError, KeyError):
            return JSONResponse({"error": "invalid_token", "error_description": "The token is not valid"}, 400)
        return JSONResponse(claims)

    async def _issue(self, request: Request) -> Response:
        form = await _form(request)
        assert form["grant_type"] == "client_credentials"
        assert form["client_id"] == LOGIN[0]
        token = f"own-{len(self.own_tokens)}"
        self.own_tokens.add(token)
        return JSONResponse({"access_token": token, "token_type": "bearer", "expires_in": self.lasts})


class CloudControllerStub(Stub):
    """`apps` tells the space of each app, `developers` the spaces of each user. At most `per_page` on a page.

    `groups` are the security groups as it lists them; `last_update` is when they changed, None if it does not tell.
    `during`, if set, is called for each page of them, before it is made.
    """

    def __init__(self, uaa: Uaa, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(tls)
        self.uaa = uaa
        self.apps: dict[str, str] = {}
        self.developers: dict[str, set[str]] = {}
        self.per_page = 5000
        self.groups: dict[str, dict[str, Any]] = {}
        self.last_update: str | None = None
        self.during: Callable[[], None] | None = None

    async def answer(self, request: Request) -> Response:
        if request.headers.get("authorization", "").removeprefix("bearer ") not in self.uaa.own_tokens:
            return JSONResponse({"errors": [{"title": "CF-InvalidAuthToken"}]}, 401)
        query = request.query_params
        match request.url.path:
            case "/v3/apps":
                guids, spaces = _filter(query, "guids"), _filter(query, "space_guids")
                found = [
                    (guid, space) for guid, space in sorted(self.apps.items()) if guid in guids and space in spaces
                ]
                return self._page(request, [app(*item) for item in found])
            case "/v3/security_groups":
                if self.during is not None:
                    self.during()
                return self._page(request, list(self.groups.values()))
            case "/internal/v4/asg_latest_update" if self.last_update is not None:
                return JSONResponse({"last_update": self.last_update})
            case "/v3/roles":
                assert query["types"] == "space_developer"
                users = query["user_guids"].split(",")
                spaces = _filter(query, "space_guids")
                pairs = [(user, space) for user in users for space in sorted(self.developers.get(user, ()))]
                return self._page(request, [role(*pair) for pair in pairs if pair[1] in spaces])
        return JSONResponse({"errors": [{"title": "CF-NotFound"}]}, 404)

    def _page(self, request: Request, found: list[Any]) -> Response:
        size = min(int(request.query_params.get("per_page", "50")), self.per_page)
        page = int(request.query_params.get("page", "1"))
        pages = max(1, -(-len(found) // size))
        following = {"href": "https://api.example.com/elsewhere"} if page < pages else None
        pagination = {"total_results": len(found), "total_pages": pages, "next": following}
        return JSONResponse({"pagination": pagination, "resources": found[(page - 1) * size : page * size]})


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


def _filter(query: Mapping[str, str], name: str) -> Container[str]:
    return query[name].split(",") if name in query else _Everything()


async def _form(request: Request) -> dict[str, str]:
    return dict(parse_qsl((await request.body()).decode(), keep_blank_values=True))


def app(guid: str, space: str) -> dict[str, Any]:
    return {
        "guid": guid,
        "name": f"name of {guid}",
        "relationships": {"space": {"data": {"guid": space}}},
        "links": {"space": {"href": f"https://api.example.com/v3/spaces/{space}"}},
    }


def security_group(
    guid: str,
    *rules: Any,
    name: str | None = None,
    running: bool = False,
    staging: bool = False,
    running_spaces: Sequence[str] = (),
    staging_spaces: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "guid": guid,
        "created_at": "2020-02-20T17:42:08Z",
        "updated_at": "2020-02-20T17:42:08Z",
        "name": name or f"name-of-{guid}",
        "globally_enabled": {"running": running, "staging": staging},
        "rules": list(rules),
        "relationships": {
            "running_spaces": {"data": [{"guid": space} for space in running_spaces]},
            "staging_spaces": {"data": [{"guid": space} for space in staging_spaces]},
        },
        "links": {"self": {"href": f"https://api.example.com/v3/security_groups/{guid}"}},
    }


def rule(protocol: str = "tcp", destination: str = "10.0.0.0/8", **more: Any) -> dict[str, Any]:
    ports = {"ports": "443"} if protocol in ("tcp", "udp") else {}
    return {"protocol": protocol, "destination": destination, **ports, **more}


def role(user: str, space: str, kind: str = "space_developer") -> dict[str, Any]:
    related = {"user": {"data": {"guid": user}}, "space": {"data": {"guid": space}}, "organization": {"data": None}}
    return {"guid": f"role-{user}-{space}", "type": kind, "relationships": related}


def published(kid: str, key: Any) -> dict[str, Any]:
    """A key as UAA publishes it."""
    algorithm: Any = jwt.get_algorithm_by_name(_algorithm(key))
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig", "alg": _algorithm(key)}


def _algorithm(key: Any) -> str:
    return "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"


RSA_KEYS = [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def remote(stub: Stub, name: str = "UAA") -> Remote:
    return Remote(name, stub.url, ssl.create_default_context())


def own_token(uaa: Uaa) -> OwnToken:
    return OwnToken(remote(uaa), LOGIN)


def certificate(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """A certificate for loopback: its authority's file, and certificate and key."""
    authority = Authority(folder, "ca")
    authority.ensure()
    files = folder / "server.crt", folder / "server.key"
    authority.issue(*files, names=["IP:127.0.0.1"], usage="serverAuth")
    return authority.certificate, files
