"""What every request passes before and after its handler, in the contract's order (contract/policy.md 1.2).

Version (406), then token and scopes (401, 403), then the handler, which reads the body. A step that refuses raises
`ApiError`. All answers leave by `Endpoints`, which puts the headers on, counts and logs.

The original's answers are mended in two ways: errors are valid JSON whatever is in their text, and JSON is called
application/json.
"""

import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import Counter, Histogram
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bus.log import about
from services.policy.access import Access, Forbidden
from services.policy.cors import Origins, preflight
from services.policy.identity import Authenticator, Identity, Unavailable

log = logging.getLogger(__name__)

RETRY_AFTER = 5
"""Seconds after which a client may try again when something we depend on is away."""
NOBODY = Identity(subject="", user="", scopes=())

REQUESTS = Histogram("silkbus_api_request_seconds", "Time to answer", ["route", "status"])
ERRORS = Counter("silkbus_api_errors_total", "Error answers", ["status"])

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-XSS-Protection": "1; mode=block",
    "X-Frame-Options": "deny",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
_HSTS = {"Strict-Transport-Security": "max-age=31536000"}


class ApiError(Exception):
    """An answer that is an error, with HTTP's status and the contract's text."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Call:
    """A request that passed the steps before its handler.

    `version` is empty where the path has none; `identity` is NOBODY where no token is needed.
    """

    request: Request
    request_id: str
    version: str
    identity: Identity


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What one method of one path does. Without `scopes` it needs no token; else a token with one of them."""

    name: str
    handler: Handler
    scopes: tuple[str, ...] = ()


class _Version(StringConvertor):
    regex = "[^/]*"  # the empty version is a wrong one, not another path


register_url_convertor("version", _Version())


class Endpoints:
    """Makes routes of operations. `versions` are those that a path with a version may have; `tls` adds HSTS."""

    def __init__(
        self,
        authenticator: Authenticator,
        access: Access,
        *,
        versions: Collection[str],
        origins: Origins,
        tls: bool,
    ) -> None:
        self._authenticator = authenticator
        self._access = access
        self._versions = versions
        self._origins = origins
        self._headers = {**_HEADERS, **(_HSTS if tls else {})}

    def route(self, path: str, **operations: Operation) -> Route:
        """The route of a path, by method, in the order in which OPTIONS names them."""

        async def endpoint(request: Request) -> Response:
            if request.method == "OPTIONS":
                response = Response(headers=preflight(list(operations)))
            else:
                response = await self._answer(operations[request.method], request)
            response.headers.update(self._headers)
            response.headers.update(self._origins.headers(request.headers.get("origin")))
            return response

        route = Route(path, endpoint)
        route.methods = {*operations, "OPTIONS"}  # given to Route, GET would bring HEAD with it; the contract has none
        return route

    async def not_found(self, _request: Request, _error: Exception) -> Response:
        return PlainTextResponse("404 page not found\n", 404, headers={"X-Content-Type-Options": "nosniff"})

    async def not_allowed(self, _request: Request, error: Exception) -> Response:
        allowed = (error.headers if isinstance(error, HTTPException) else None) or {}
        return PlainTextResponse("Method Not Allowed\n", 405, headers={**allowed, **self._headers})

    async def _answer(self, operation: Operation, request: Request) -> Response:
        started = time.monotonic()
        own_id = str(uuid.uuid4())
        incoming = request.headers.get("x-vcap-request-id")
        request_id = f"{incoming}::{own_id}" if incoming else own_id
        where = about(method=request.method, url=str(request.url), request=request_id)
        log.debug("serving", extra=where)
        try:
            response = await operation.handler(await self._admit(operation, request, own_id))
        except ApiError as error:
            response = _error(error, operation.name, request_id)
        except Exception as error:
            log.exception("request failed", extra=about(route=operation.name, request=request_id))
            text = f"unexpected error: {type(error).__name__}; see the server's log for request {request_id}"
            response = _error(ApiError(500, text), operation.name, request_id)
        response.headers["X-Vcap-Request-Id"] = request_id
        REQUESTS.labels(operation.name, response.status_code).observe(time.monotonic() - started)
        log.debug("done", extra=where)
        return response

    async def _admit(self, operation: Operation, request: Request, request_id: str) -> Call:
        version = request.path_params.get("version", "")
        if version not in self._versions and "version" in request.path_params:
            raise ApiError(406, f"api version '{version}' not supported")
        identity = await self._authorise(request, operation.scopes) if operation.scopes else NOBODY
        return Call(request, request_id, version, identity)

    async def _authorise(self, request: Request, scopes: tuple[str, ...]) -> Identity:
        header = request.headers.get("authorization", "")
        if not header:
            raise ApiError(401, "missing authorization header", {"WWW-Authenticate": "Bearer"})
        refused = "failed to verify token with uaa"
        with answering(refused):
            identity = await self._authenticator.verify(header.removeprefix("Bearer ").removeprefix("bearer "))
            if identity is None:
                raise ApiError(401, refused, {"WWW-Authenticate": "Bearer"})
            self._access.check_scopes(identity, scopes)
        return identity


@contextmanager
def answering(failed: str) -> Iterator[None]:
    """Make refusals the answers they are; `failed` names the step when nobody can say whether to refuse."""
    try:
        yield
    except Forbidden as error:
        raise ApiError(403, str(error)) from None
    except Unavailable as error:
        # Neither 401 nor 403: clients would throw a good token away, or take for final what is over in a minute.
        text = f"{failed}: {error}; try again shortly, and tell the operator if it lasts"
        raise ApiError(503, text, {"Retry-After": str(RETRY_AFTER)}) from error


def _error(error: ApiError, route: str, request_id: str) -> Response:
    ERRORS.labels(error.status).inc()
    log.error(str(error), extra=about(route=route, status=error.status, request=request_id))
    body = json.dumps({"error": str(error)}, ensure_ascii=False).encode(errors="replace")
    return Response(body, error.status, headers=error.headers, media_type="application/json")
