"""The handlers of the external API (contract/policy.md 1.3 to 1.8); `endpoint` has what is around each of them."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bus.database import is_transient
from bus.decode import Malformed
from bus.local import Health
from bus.log import about
from bus.messages import Policy, Revision
from services.policy import explain_http, history_http, openapi, wire_v0, wire_v1
from services.policy.access import Access, Forbidden, is_admin, refused
from services.policy.cleanup import Refused
from services.policy.cors import Origins
from services.policy.endpoint import ApiError, Call, Endpoints, Operation, answering
from services.policy.explain import explain
from services.policy.history import History, NoSuchRevision, TooFarBack
from services.policy.identity import ADMIN, WRITE, Authenticator, Unavailable
from services.policy.instances import Instances
from services.policy.listing import Listing
from services.policy.status_http import StatusApi
from services.policy.store import Filter, QuotaExceeded, Store
from services.policy.tag_pool import TagsExhausted
from services.policy.upkeep import Upkeep
from services.policy.wire import Wire

log = logging.getLogger(__name__)

MAX_BODY = 10 << 20
MAX_DRAINED = 64 << 20
"""A body that is too long is still read, up to here: a client sees our answer only once it has written its request."""
BODY_TIMEOUT = 60.0
CHECK_TIMEOUT = 5.0
LONG_BODY = 64 << 10
"""Bytes from which a body is decoded beside the event loop."""

WIRES: Mapping[str, Wire] = {"v0": wire_v0, "v1": wire_v1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an operator may choose.

    `max_policies` is how many policies one source app may have, as far as those who are no admins can add to them;
    `tag_length` how many bytes tags are written with; `origins` whose pages may read answers; `tls` whether the API is
    served over TLS.
    """

    max_policies: int = 150
    tag_length: int = 2
    origins: Origins = field(default_factory=Origins)
    tls: bool = False


class Gateway:
    """The handlers. `bus_connected` says whether changes are published as they are made.

    Without `upkeep` there is no Cloud Controller that knows which apps are gone; without `instances` no cell is asked.
    """

    def __init__(
        self,
        store: Store,
        listing: Listing,
        history: History,
        authenticator: Authenticator,
        access: Access,
        options: Options,
        *,
        bus_connected: Callable[[], bool],
        upkeep: Upkeep | None = None,
        status: StatusApi | None = None,
        instances: Instances | None = None,
    ) -> None:
        self._store = store
        self._listing = listing
        self._history = history
        self._access = access
        self._options = options
        self._bus_connected = bus_connected
        self._upkeep = upkeep
        self._status = status
        self._instances = instances
        self._process = Health()
        self._started = time.monotonic_ns()
        self._endpoints = Endpoints(
            authenticator, access, versions=WIRES.keys(), origins=options.origins, tls=options.tls
        )

    def application(self) -> Starlette:
        route = self._endpoints.route
        external = "/networking/{version:version}/external"
        uptime = Operation("Uptime", self._uptime)
        app = Starlette(
            routes=[
                route("/", GET=uptime),
                route("/networking", GET=uptime),
                route("/health", GET=Operation("Health", self._health)),
                route(f"{external}/whoami", GET=Operation("WhoAmI", self._whoami, (ADMIN,))),
                route(
                    f"{external}/policies",
                    POST=Operation("CreatePolicies", self._create, (ADMIN, WRITE)),
                    GET=Operation("PoliciesIndex", self._index, (ADMIN, WRITE)),
                ),
                route(f"{external}/policies/delete", POST=Operation("DeletePolicies", self._delete, (ADMIN, WRITE))),
                route(f"{external}/policies/cleanup", POST=Operation("Cleanup", self._cleanup, (ADMIN,))),
                route(f"{external}/history", GET=Operation("History", self._changes, (ADMIN,))),
                route(f"{external}/explain", GET=Operation("Explain", self._explain, (ADMIN, WRITE))),
                route(f"{external}/tags", GET=Operation("TagsIndex", self._tags, (ADMIN,))),
                *([] if self._status is None else self._status.routes(route, external)),
                route("/openapi.json", GET=Operation("OpenAPI", self._openapi)),
                Route("/livez", self._process.livez),
                Route("/readyz", self._readyz),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={404: self._endpoints.not_found, 405: self._endpoints.not_allowed},
        )
        app.router.redirect_slashes = False
        return app

    async def _uptime(self, _: Call) -> Response:
        up = go_duration(time.monotonic_ns() - self._started)
        return PlainTextResponse(f"Network policy server, up for {up}\n")

    async def _openapi(self, _: Call) -> Response:
        return Response(openapi.document(), media_type="application/json")

    async def _whoami(self, call: Call) -> Response:
        return _json({"subject": call.identity.user})

    async def _tags(self, call: Call) -> Response:
        with _storing("database read failed", call):
            tags = await self._store.tags()
        digits = 2 * self._options.tag_length
        return _json({"tags": [{"id": app, "tag": f"{tag:0{digits}X}", "type": kind} for app, tag, kind in tags]})

    async def _health(self, _: Call) -> Response:
        if await self._database_problem() is not None:
            raise ApiError(500, "check database failed")
        return Response()

    async def _readyz(self, _: Request) -> Response:
        """Ready while the database answers: changes made while the bus is away are published when it is back."""
        problem = await self._database_problem()
        bus = "ok" if self._bus_connected() else "away; changes are accepted and published once it is back"
        text = f"database: {problem or 'ok'}\nbus: {bus}\n"
        if self._upkeep is not None:
            text += f"upkeep: {self._upkeep.state()}\n"
        return PlainTextResponse(text, status_code=200 if problem is None else 503)

    async def _metrics(self, request: Request) -> Response:
        with suppress(Exception):  # the number of policies stays the last one known; readyz says what is wrong
            async with asyncio.timeout(CHECK_TIMEOUT):
                await self._listing.refresh()
        return await self._process.metrics(request)

    async def _create(self, call: Call) -> Response:
        policies = await self._policies(call, too_long="failed reading request body")
        with answering("check access failed"):
            await self._access.check_change(call.identity, policies)
        quota = None if is_admin(call.identity) else self._options.max_policies
        with _storing("database create failed", call):
            try:
                revision = await self._store.create(
                    policies, actor=call.identity.user, request_id=call.request_id, quota=quota
                )
            except QuotaExceeded as error:
                raise ApiError(403, "policy quota exceeded") from error
            except TagsExhausted as error:
                raise ApiError(500, f"database create failed: {error}") from error
        return _changed(revision)

    async def _delete(self, call: Call) -> Response:
        policies = await self._policies(call, too_long="invalid request body")
        with answering("check access failed"):
            await self._access.check_change(call.identity, policies)
        with _storing("database delete failed", call):
            revision = await self._store.delete(policies, actor=call.identity.user, request_id=call.request_id)
        return _changed(revision)

    async def _cleanup(self, call: Call) -> Response:
        failed = "policies cleanup failed"
        if self._upkeep is None:
            raise ApiError(501, f"{failed}: no Cloud Controller can be asked which apps are gone; set cc_url")
        force = call.request.query_params.get("force") == "true"
        with _storing(failed, call):
            try:
                gone = await self._upkeep.cleaner.clean(
                    actor=call.identity.user, request_id=call.request_id, force=force
                )
            except Refused as error:
                raise ApiError(409, f"{failed}: {error}") from None
        return Response(wire_v1.encode(gone), media_type="application/json")

    async def _index(self, call: Call) -> Response:
        wanted = _filter(call.request)
        wire = WIRES[call.version]
        with _storing("database read failed", call):
            at = _parameter(call.request, "at")
            if at is not None:
                return await self._past(call, at, wanted)
            state = await self._listing.refresh()
            if not is_admin(call.identity):
                return await self._visible(call, self._listing.find(wanted))
            # The same for every admin, until the next change.
            tag = {"ETag": f'W/"{state}"'}
            if tag["ETag"] in call.request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=tag)
            if wanted == Filter():
                text = await self._listing.encoded(wire)
            else:
                text = wire.encode(self._listing.find(wanted))
        return Response(text, media_type="application/json", headers=tag)

    async def _past(self, call: Call, revision: int, wanted: Filter) -> Response:
        """The list as it was at a revision."""
        try:
            policies = await self._history.policies_at(revision)
        except TooFarBack as error:
            raise ApiError(400, str(error)) from None
        except NoSuchRevision as error:
            raise ApiError(404, str(error)) from None
        return await self._visible(call, [policy for policy in policies if wanted.matches(policy)])

    async def _visible(self, call: Call, policies: list[Policy]) -> Response:
        with answering("filter policies failed"):
            seen = await self._access.visible(call.identity, policies)
        return Response(WIRES[call.version].encode(seen), media_type="application/json")

    async def _changes(self, call: Call) -> Response:
        try:
            wanted = history_http.wanted(call.request.query_params)
        except history_http.BadParameter as error:
            raise ApiError(400, str(error)) from None
        with _storing("database read failed", call):
            entries, following = await self._history.page(wanted)
        return Response(history_http.encode(entries, following), media_type="application/json")

    async def _explain(self, call: Call) -> Response:
        try:
            flow = explain_http.flow(call.request.query_params)
            probe = explain_http.probe(call.request.query_params)
        except history_http.BadParameter as error:
            raise ApiError(400, str(error)) from None
        with answering("check access failed"):
            # Who would see a policy between the two may know of those there are, and of those there were.
            if not await self._access.visible(call.identity, [explain_http.as_policy(flow)]):
                raise refused()
            if probe and not is_admin(call.identity):
                raise Forbidden("probe: connections are tried for those with network.admin only")
        with _storing("database read failed", call):
            found = await explain(self._history.ledger, flow)
        cells = None if self._instances is None else await self._instances.ask(flow, probe=probe)
        names = is_admin(call.identity)
        body = explain_http.encode(flow, found, cells, tag_length=self._options.tag_length, names=names)
        return Response(body, media_type="application/json")

    async def _policies(self, call: Call, *, too_long: str) -> list[Policy]:
        body = await _body(call.request)
        if body is None:
            raise ApiError(400, too_long)
        decode = WIRES[call.version].decode
        try:
            return decode(body) if len(body) < LONG_BODY else await asyncio.to_thread(decode, body)
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
def _storing(failed: str, call: Call) -> Iterator[None]:
    """Make what the database raises the answer that the contract has for it, or 503 while it is away."""
    try:
        with answering(failed):
            try:
                yield
            except Exception as error:
                if not is_transient(error):
                    raise
                log.warning(failed, extra=about(request=call.request_id, error=repr(error)))
                raise Unavailable("the database does not answer") from error
    except ApiError:
        raise
    except Exception as error:
        log.exception(failed, extra=about(request=call.request_id))
        raise ApiError(500, failed) from error


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


def _parameter(request: Request, name: str) -> int | None:
    try:
        return history_http.integer(request.query_params, name)
    except history_http.BadParameter as error:
        raise ApiError(400, str(error)) from None


def _filter(request: Request) -> Filter:
    def ids(name: str) -> frozenset[str] | None:
        values = request.query_params.getlist(name)
        # PostgreSQL's texts have no NUL, and neither has any id.
        return frozenset(item for item in values[0].split(",") if "\0" not in item) if values else None

    either = ids("id")
    return (
        Filter(either=either) if either is not None else Filter(sources=ids("source_id"), destinations=ids("dest_id"))
    )


def _changed(revision: Revision) -> Response:
    return Response(b"{}", media_type="application/json", headers={"X-Silkbus-Revision": str(revision)})


def _json(value: object) -> Response:
    return Response(json.dumps(value, separators=(",", ":"), ensure_ascii=False), media_type="application/json")


def go_duration(nanoseconds: int) -> str:
    """A time as Go writes one: 34.391474099s, 1h0m0.5s, 250ms."""
    for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
        if nanoseconds < size * 1_000 and nanoseconds < 1_000_000_000:
            return f"{_decimal(nanoseconds, size)}{unit}" if nanoseconds else "0s"
    minutes, rest = divmod(nanoseconds, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{prefix}{_decimal(rest, 1_000_000_000)}s"


def _decimal(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    digits = len(str(unit)) - 1
    return f"{whole}.{rest:0{digits}d}".rstrip("0").rstrip(".") if rest else str(whole)
