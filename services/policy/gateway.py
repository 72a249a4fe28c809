"""The external API over HTTP: routes, the order of the checks, headers and errors (contract/policy.md 1.2 to 1.8).

Each route is a handler behind the same steps: version (406), token and scope (401, 403), body (400), handler. A step
that refuses raises `ApiError`; all answers leave through `_Endpoint`, which puts the headers on. Where the original's
answers were mended: errors are valid JSON whatever is in their text, and JSON is called application/json.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import Counter, Histogram
from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bus.decode import Malformed
from bus.local import Health
from bus.log import about
from bus.messages import Policy, Revision
from services.policy import wire_v1
from services.policy.access import Access, Forbidden, is_admin
from services.policy.identity import ADMIN, WRITE, Authenticator, Identity, Unavailable
from services.policy.store import Filter, QuotaExceeded, Store
from services.policy.tag_pool import TagsExhausted

log = logging.getLogger(__name__)

MAX_BODY = 10 << 20
MAX_DRAINED = 64 << 20
"""A body that is too long is still read, up to here: a client sees our answer only once it has written its request."""
BODY_TIMEOUT = 60.0
CHECK_TIMEOUT = 5.0
RETRY_AFTER = 5
"""Seconds after which a client may try again when something we depend on is away."""
NOBODY = Identity(subject="", user="", scopes=())
VERSIONS = ("v1",)

REQUESTS = Histogram("silkbus_api_request_seconds", "Time to answer", ["route", "status"])
ERRORS = Counter("silkbus_api_errors_total", "Error answers", ["status"])

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-XSS-Protection": "1; mode=block",
    "X-Frame-Options": "deny",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


class ApiError(Exception):
    """An answer that is an error, with HTTP's status and the contract's text."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Call:
    """A request that passed the steps before its handler. `identity` is NOBODY where no token is needed."""

    request: Request
    request_id: str
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


class Gateway:
    """The handlers.

    `max_policies` is how many policies one source app may have, as far as those who are no admins can add to them.
    `bus_connected` says whether changes are published as they are made.
    """

    def __init__(
        self,
        store: Store,
        authenticator: Authenticator,
        access: Access,
        *,
        max_policies: int,
        bus_connected: Callable[[], bool],
    ) -> None:
        self._store = store
        self._authenticator = authenticator
        self._access = access
        self._max_policies = max_policies
        self._bus_connected = bus_connected
        self._started = time.monotonic()

    def application(self) -> Starlette:
        external = "/networking/{version:version}/external"
        uptime = Operation("Uptime", self._uptime)
        health = Health()
        app = Starlette(
            routes=[
                self._route("/", GET=uptime),
                self._route("/networking", GET=uptime),
                self._route("/health", GET=Operation("Health", self._health)),
                self._route(
                    f"{external}/policies",
                    POST=Operation("CreatePolicies", self._create, (ADMIN, WRITE)),
                    GET=Operation("PoliciesIndex", self._index, (ADMIN, WRITE)),
                ),
                self._route(
                    f"{external}/policies/delete",
                    POST=Operation("DeletePolicies", self._delete, (ADMIN, WRITE)),
                ),
                Route("/livez", health.livez),
                Route("/readyz", self._readyz),
                Route("/metrics", health.metrics),
            ],
            exception_handlers={404: _not_found, 405: _not_allowed},
        )
        app.router.redirect_slashes = False
        return app

    def _route(self, path: str, **operations: Operation) -> Route:
        async def endpoint(request: Request) -> Response:
            return await self._answer(operations[request.method], request)

        route = Route(path, endpoint, methods=list(operations))
        route.methods = set(operations)  # starlette adds HEAD to GET; the contract has none
        return route

    async def _answer(self, operation: Operation, request: Request) -> Response:
        started = time.monotonic()
        own_id = str(uuid.uuid4())
        incoming = request.headers.get("x-vcap-request-id")
        request_id = f"{incoming}::{own_id}" if incoming else own_id
        try:
            version = request.path_params.get("version", VERSIONS[0])
            if version not in VERSIONS:
                raise ApiError(406, f"api version '{version}' not supported")
            identity = await self._authorise(request, operation.scopes) if operation.scopes else NOBODY
            response = await operation.handler(Call(request, own_id, identity))
        except ApiError as error:
            response = _error(error, operation.name, request_id)
        except Exception as error:
            log.exception("request failed", extra=about(route=operation.name, request=request_id))
            text = f"unexpected error: {type(error).__name__}; see the server's log for request {request_id}"
            response = _error(ApiError(500, text), operation.name, request_id)
        response.headers.update(_HEADERS)
        response.headers["X-Vcap-Request-Id"] = request_id
        REQUESTS.labels(operation.name, response.status_code).observe(time.monotonic() - started)
        return response

    async def _authorise(self, request: Request, scopes: tuple[str, ...]) -> Identity:
        header = request.headers.get("authorization", "")
        if not header:
            raise ApiError(401, "missing authorization header", {"WWW-Authenticate": "Bearer"})
        refused = "failed to verify token with uaa"
        with _answering(refused):
            identity = await self._authenticator.verify(header.removeprefix("Bearer ").removeprefix("bearer "))
            if identity is None:
                raise ApiError(401, refused, {"WWW-Authenticate": "Bearer"})
            self._access.check_scopes(identity, scopes)
        return identity

    async def _uptime(self, _: Call) -> Response:
        return PlainTextResponse(f"Network policy server, up for {time.monotonic() - self._started:.9f}s\n")

    async def _health(self, _: Call) -> Response:
        if await self._database_problem() is not None:
            raise ApiError(500, "check database failed")
        return Response()

    async def _readyz(self, _: Request) -> Response:
        """Ready while the database answers: changes made while the bus is away are published when it is back."""
        problem = await self._database_problem()
        bus = "ok" if self._bus_connected() else "away; changes are accepted and published once it is back"
        text = f"database: {problem or 'ok'}\nbus: {bus}\n"
        return PlainTextResponse(text, status_code=200 if problem is None else 503)

    async def _create(self, call: Call) -> Response:
        policies = await self._policies(call, too_long="failed reading request body")
        with _answering("check access failed"):
            await self._access.check_change(call.identity, policies)
        quota = None if is_admin(call.identity) else self._max_policies
        try:
            revision = await self._store.create(
                policies, actor=call.identity.user, request_id=call.request_id, quota=quota
            )
        except QuotaExceeded as error:
            raise ApiError(403, "policy quota exceeded") from error
        except TagsExhausted as error:
            raise ApiError(500, f"database create failed: {error}") from error
        except Exception as error:
            log.exception("create failed", extra=about(request=call.request_id))
            raise ApiError(500, "database create failed") from error
        return _changed(revision)

    async def _delete(self, call: Call) -> Response:
        policies = await self._policies(call, too_long="invalid request body")
        with _answering("check access failed"):
            await self._access.check_change(call.identity, policies)
        try:
            revision = await self._store.delete(policies, actor=call.identity.user, request_id=call.request_id)
        except Exception as error:
            log.exception("delete failed", extra=about(request=call.request_id))
            raise ApiError(500, "database delete failed") from error
        return _changed(revision)

    async def _index(self, call: Call) -> Response:
        try:
            policies = await self._store.list(_filter(call.request))
        except Exception as error:
            log.exception("list failed", extra=about(request=call.request_id))
            raise ApiError(500, "database read failed") from error
        with _answering("filter policies failed"):
            policies = await self._access.visible(call.identity, policies)
        return Response(wire_v1.encode(policies), media_type="application/json")

    async def _policies(self, call: Call, *, too_long: str) -> list[Policy]:
        body = await _body(call.request)
        if body is None:
            raise ApiError(400, too_long)
        try:
            return wire_v1.decode(body)
        except Malformed as error:
            raise ApiError(400, str(error)) from None

    async def _database_problem(self) -> str | None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                await self._store.check()
        except TimeoutError:
            return f"does not answer within {CHECK_TIMEOUT:g} s"
        except Exception as error:  # noqa: BLE001 (each database driver has errors of its own)
            log.warning("the database does not answer", extra=about(error=repr(error)))
            return repr(error)
        return None


@contextmanager
def _answering(failed: str) -> Iterator[None]:
    """Make refusals the answers they are; `failed` names the step when nobody can say whether to refuse."""
    try:
        yield
    except Forbidden as error:
        raise ApiError(403, str(error)) from None
    except Unavailable as error:
        # Neither 401 nor 403: clients would throw a good token away, or take for final what is over in a minute.
        text = f"{failed}: {error}; try again shortly, and tell the operator if it lasts"
        raise ApiError(503, text, {"Retry-After": str(RETRY_AFTER)}) from error


async def _body(request: Request) -> bytes | None:
    """The request's body, or None for one that is too long or does not come."""
    body, total = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for part in request.stream():
                total += len(part)
                if total <= MAX_BODY:
                    body += part
                elif total > MAX_DRAINED:
                    break
    except (TimeoutError, ClientDisconnect):
        return None
    return bytes(body) if total <= MAX_BODY else None


def _filter(request: Request) -> Filter:
    def ids(name: str) -> frozenset[str] | None:
        values = request.query_params.getlist(name)
        return frozenset(values[0].split(",")) if values else None

    either = ids("id")
    return (
        Filter(either=either) if either is not None else Filter(sources=ids("source_id"), destinations=ids("dest_id"))
    )


def _changed(revision: Revision) -> Response:
    return Response(b"{}", media_type="application/json", headers={"X-Silkbus-Revision": str(revision)})


def _error(error: ApiError, route: str, request_id: str) -> Response:
    ERRORS.labels(error.status).inc()
    log.error(str(error), extra=about(route=route, status=error.status, request=request_id))
    body = json.dumps({"error": str(error)}, ensure_ascii=False)
    return Response(body, error.status, headers=error.headers, media_type="application/json")


async def _not_found(_request: Request, _error: Exception) -> Response:
    return PlainTextResponse("404 page not found\n", 404, headers={"X-Content-Type-Options": "nosniff"})


async def _not_allowed(_request: Request, error: Exception) -> Response:
    allowed = (error.headers if isinstance(error, HTTPException) else None) or {}
    return PlainTextResponse("Method Not Allowed\n", 405, headers={**allowed, **_HEADERS})
