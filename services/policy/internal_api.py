"""The internal API, for foreign agents on the cells (contract/policy.md 2): answers from memory.

An ASGI application of its own rather than Starlette's, since thousands of cells ask every few seconds for what lies
ready as bytes: routing and middleware would cost more than answering. What the original gets wrong is mended where no
agent can tell: errors are valid JSON, JSON is called so, a group without a name gets no tag.

A server that has not seen the database for MAX_AGE answers as the original does when its database is away. Agents then
keep what they have; answers of any age could take back what another server has already told them.
"""

import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from bus.decode import Malformed
from bus.json_input import get_text, parse
from bus.log import about
from bus.messages import MAX_APP_ID, AppId, Tag
from services.policy.endpoint import ERRORS, REQUESTS
from services.policy.group_view import GroupView
from services.policy.policy_view import SETTLE_SECONDS, Body, PolicyView
from services.policy.store import OtherType, Store
from services.policy.tag_pool import TagsExhausted

log = logging.getLogger(__name__)

MAX_AGE = 0.8 * SETTLE_SECONDS
"""Seconds for which answers are given without a look at the database; one look a second is usual."""
MAX_BODY = 64 << 10
COMPRESSED_FROM = 4096
_INT64 = 2**63

_JSON = (b"content-type", b"application/json")
_TEXT = (b"content-type", b"text/plain; charset=utf-8")

Header = tuple[bytes, bytes]


class Failed(Exception):
    """An answer that is an error, with HTTP's status and the contract's text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Request:
    """One request, and how it is answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._send = send
        own = str(uuid.uuid4()).encode()
        incoming = self.headers.get(b"x-vcap-request-id")
        self.id = incoming + b"::" + own if incoming else own
        self.status = 0

    def parameter(self, name: str) -> str | None:
        """The first of the query's parameters of this name."""
        if not self.query:
            return None
        items = parse_qsl(self.query.decode("latin-1"), keep_blank_values=True, max_num_fields=100)
        return next((value for key, value in items if key == name), None)

    async def body(self) -> bytes | None:
        """The body, None for one that is too long or breaks off."""
        data, more = b"", True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                return None
            if len(data) <= MAX_BODY:
                data += message.get("body", b"")
            more = message.get("more_body", False)
        return data if len(data) <= MAX_BODY else None

    async def answer(self, status: int, body: bytes, *headers: Header) -> None:
        self.status = status
        own: Iterable[Header] = (
            (b"strict-transport-security", b"max-age=31536000"),
            (b"x-vcap-request-id", self.id),
            (b"content-length", b"%d" % len(body)),
        )
        await self._send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
        await self._send({"type": "http.response.body", "body": body})

    async def answer_body(self, body: Body) -> None:
        """Answer 200, compressed for those who can read that, or 304 to those who have it already."""
        if self.has(body.etag):
            await self.answer_unchanged(body.etag)
            return
        headers = (_JSON, (b"etag", body.etag), (b"vary", b"accept-encoding"))
        if len(body.plain) >= COMPRESSED_FROM and b"gzip" in self.headers.get(b"accept-encoding", b""):
            await self.answer(200, await body.gzipped(), *headers, (b"content-encoding", b"gzip"))
        else:
            await self.answer(200, body.plain, *headers)

    def has(self, etag: bytes) -> bool:
        """Whether the client has an answer with this ETag (RFC 9110, 13.1.2: compared weakly)."""
        wanted = self.headers.get(b"if-none-match")
        return wanted is not None and any(item.strip() in (etag, etag[2:], b"*") for item in wanted.split(b","))

    async def answer_unchanged(self, etag: bytes) -> None:
        await self.answer(304, b"", (b"etag", etag))


class InternalApi:
    """The application. `ages` say how old what the views know is, in seconds."""

    def __init__(
        self,
        policies: PolicyView,
        groups: GroupView,
        store: Store,
        *,
        policies_age: Callable[[], float],
        groups_age: Callable[[], float],
        tag_length: int,
    ) -> None:
        self._policies = policies
        self._groups = groups
        self._store = store
        self._policies_age = policies_age
        self._groups_age = groups_age
        self._digits = 2 * tag_length
        self._given: dict[tuple[AppId, str], Tag] = {}
        """Tags of groups, by type: once they have one they keep it."""
        self._operations: dict[str, tuple[str, str, Callable[[_Request], Awaitable[None]]]] = {
            "policies": ("GET", "InternalPolicies", self._list),
            "policies_last_updated": ("GET", "InternalPoliciesLastUpdated", self._last_updated),
            "security_groups": ("GET", "InternalSecurityGroups", self._security_groups),
            "tags": ("PUT", "CreateTags", self._give_tag),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Request(scope, receive, send)
        match request.path.split("/"):
            case ["", "networking", version, "internal", name] if name in self._operations and (
                name != "tags" or version == "v1"
            ):
                method, route, handler = self._operations[name]
            case _:
                await request.answer(404, b"404 page not found\n", _TEXT)
                return
        if request.method != method:
            await request.answer(405, b"Method Not Allowed\n", _TEXT, (b"allow", method.encode()))
            return
        begun = time.monotonic()
        try:
            await handler(request)
        except Failed as error:
            await _fail(request, route, error)
        except Exception:
            log.exception("request failed", extra=about(route=route, request=request.id.decode("latin-1")))
            if request.status:
                raise
            await _fail(request, route, Failed(500, "unexpected error; see the server's log"))
        REQUESTS.labels(route, request.status).observe(time.monotonic() - begun)

    async def _list(self, request: _Request) -> None:
        _check(self._policies_age())
        ids = request.parameter("id")
        if ids is None and request.has(self._policies.etag):
            await request.answer_unchanged(self._policies.etag)
        else:
            await request.answer_body(self._policies.all() if ids is None else self._policies.of(ids))

    async def _last_updated(self, request: _Request) -> None:
        _check(self._policies_age())
        await request.answer(200, b"%d" % self._policies.last_updated, _TEXT)

    async def _security_groups(self, request: _Request) -> None:
        _check(self._groups_age())
        limit, start = _integer(request, "limit"), _integer(request, "from")
        await request.answer_body(self._groups.page(request.parameter("space_guids") or "", start, limit))

    async def _give_tag(self, request: _Request) -> None:
        body = await request.body()
        if body is None:
            raise Failed(400, "failed reading request body")
        try:
            fields = parse(body)
            app, kind = get_text(fields, "id", "tag"), get_text(fields, "type", "tag")
        except Malformed:
            raise Failed(400, "failed parsing request body") from None
        for name, value in (("id", app), ("type", kind)):
            if not value or len(value) > MAX_APP_ID or not value.isprintable() or value != value.strip():
                raise Failed(400, f"failed parsing request body: {name} must be 1 to {MAX_APP_ID} printable characters")
        tag = await self._tag(AppId(app), kind)
        answer = {"id": app, "tag": f"{tag:0{self._digits}X}", "type": kind}
        await request.answer(200, json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode(), _JSON)

    async def _tag(self, app: AppId, kind: str) -> Tag:
        """The group's tag. Cells ask again and again, so one that the table still has is not looked up again."""
        known = self._given.get((app, kind))
        if known is not None and self._policies.tag(app) == known:
            return known
        try:
            tag = self._given[app, kind] = await self._store.tag(app, kind, actor="internal API")
        except (OtherType, TagsExhausted) as error:
            log.error("no tag given", extra=about(app=app, type=kind, error=str(error)))
            raise Failed(500, f"database create failed: {error}") from None
        except Exception as error:
            log.exception("no tag given", extra=about(app=app, type=kind))
            raise Failed(500, "database create failed") from error
        return tag


def _check(age: float) -> None:
    if age > MAX_AGE:
        log.warning("the database was not seen of late", extra=about(seconds=round(age)))
        raise Failed(500, "database read failed")


def _integer(request: _Request, name: str) -> int:
    """A parameter that is an integer, 0 if it is not given. The contract answers 500 to others, not 400."""
    text = request.parameter(name)
    if text is None:
        return 0
    try:
        value = int(text) if text.isascii() and text.strip() == text and "_" not in text else None
    except ValueError:
        value = None
    if value is None or not -_INT64 <= value < _INT64:
        raise Failed(500, f"invalid value for '{name}' parameter")
    return value


async def _fail(request: _Request, route: str, error: Failed) -> None:
    ERRORS.labels(error.status).inc()
    log.error(str(error), extra=about(route=route, status=error.status, request=request.id.decode("latin-1")))
    body = json.dumps({"error": str(error)}, ensure_ascii=False).encode(errors="replace")
    await request.answer(error.status, body, _JSON)
