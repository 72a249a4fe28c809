"""The original's HTTP API of leases (contract/cell.md 4.3), for cells on which its daemon runs.

It speaks of cells by their underlay address; a client is believed if it has a certificate of the authority, as it is by
the original. Texts and codes are the original's, since its daemon goes by them: 409 ends it, anything else is tried
again. Where the original errs we do not: acquiring renews, and heeds the kind that is asked for; a renewed lease that
is not known is taken up only if it is a free one of the pool; leases are listed until they are ended; errors are valid
JSON.
"""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Interface

from prometheus_client import Counter, Histogram
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from bus.decode import Malformed
from bus.json_input import Object, get_flag, get_text, parse
from bus.log import about
from bus.messages import Lease, Revision
from services.silk.leases import Exhausted, LeaseLost, LeaseRefused, LeaseStore, OutsidePool
from services.silk.original_controller import OUTSIDE_POOL
from services.silk.pool import Kind
from services.silk.subnets import derived_cell

log = logging.getLogger(__name__)

MAX_BODY = 64 << 10
_TEXT = "text/plain; charset=utf-8"
_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}")

SECONDS = Histogram("silkbus_silk_lease_api_seconds", "Time to answer a request of the original's daemons", ["call"])
ERRORS = Counter("silkbus_silk_lease_api_errors_total", "Requests of the original's daemons answered with an error")

Handler = Callable[[Object], Awaitable[str]]


class Failed(Exception):
    """An answer that is an error, with HTTP's status and the original's text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class LeaseApi:
    """The four calls, over one store."""

    def __init__(self, store: LeaseStore) -> None:
        self._store = store
        self._listed: tuple[tuple[object, Revision], str] | None = None
        self._listing = asyncio.Lock()

    def application(self) -> Starlette:
        routes = [
            Route("/leases", self._answering("leases-index", self._list), methods=["GET"]),
            Route("/leases/acquire", self._answering("leases-acquire", self._acquire), methods=["PUT"]),
            Route("/leases/renew", self._answering("leases-renew", self._renew), methods=["PUT"]),
            Route("/leases/release", self._answering("leases-release", self._release), methods=["PUT"]),
        ]
        routes[0].methods = {"GET"}  # starlette adds HEAD, which the original does not route
        return Starlette(routes=routes, exception_handlers={HTTPException: _unrouted})

    async def _list(self, _: Object) -> str:
        """Each daemon asks for this every 30 s: it is made anew only when it has changed.

        A lease is listed until it is ended, as on the bus. The original lists none whose time is over; but daemons
        drop whom they do not see, and so a jump of the database's clock would cut all cells off, which `expiry` is
        there to prevent.
        """
        try:
            async with self._listing:
                head = await self._store.ledger.head()
                if self._listed is None or self._listed[0] != head:
                    leases = await self._store.all()
                    self._listed = head, _json({"leases": [_encode(lease) for lease in leases]})
                return self._listed[1]
        except Exception as error:
            raise Failed(500, f"all-routable-leases: {error!r}") from error

    async def _acquire(self, body: Object) -> str:
        with _understanding():
            text = get_text(body, "underlay_ip", "request")
            kind = Kind.SINGLE if get_flag(body, "single_overlay_ip", "request") else Kind.BLOCK
        underlay = _ipv4(text)
        if underlay is None:
            raise Failed(500, f"invalid ipv4 address: {text}")
        try:
            outcome = await self._store.acquire_at(underlay, kind)
        except Exhausted as error:
            log.error("no lease available", extra=about(underlay=text, error=str(error)))
            raise Failed(409, "no lease available") from None
        except LeaseRefused as error:
            raise Failed(409, str(error)) from None
        assert outcome.result is not None  # noqa: S101 (acquire_at raises otherwise)
        return _json(_encode(outcome.result))

    async def _renew(self, body: Object) -> str:
        with _understanding():
            underlay, subnet, mac = (
                get_text(body, name, "request") for name in ("underlay_ip", "overlay_subnet", "overlay_hardware_addr")
            )
        address = _ipv4(underlay)
        if address is None:
            raise Failed(409, f"renew-subnet-lease: invalid underlay ip: {underlay}")
        if not _is_cidr(subnet):
            raise Failed(409, f"renew-subnet-lease: invalid CIDR address: {subnet}")
        if not _MAC.fullmatch(mac):
            raise Failed(409, f"renew-subnet-lease: address {mac}: invalid MAC address")
        try:
            await self._store.renew_at(address, subnet, mac)
        except OutsidePool as error:
            log.warning("renewal refused", extra=about(underlay=underlay, subnet=subnet, error=str(error)))
            raise Failed(409, OUTSIDE_POOL) from None
        except LeaseLost:
            raise Failed(409, "renew-subnet-lease: lease mismatch") from None
        except Exception as error:
            raise Failed(500, f"renew-subnet-lease: {error!r}") from error
        return "{}"

    async def _release(self, body: Object) -> str:
        with _understanding():
            underlay = _ipv4(get_text(body, "underlay_ip", "request"))
        if underlay is not None:  # else nobody has a lease there
            await self._store.release_where("underlay", underlay, derived_cell(underlay))
        return "{}"

    def _answering(self, call: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            with SECONDS.labels(call).time():
                try:
                    body = await _body(request) if request.method == "PUT" else {}
                    return Response(await handler(body), media_type=_TEXT)
                except Failed as error:
                    status, text = error.status, str(error)
                except ClientDisconnect:
                    status, text = 400, "read-body: unexpected EOF"
                except Exception as error:  # noqa: BLE001 (each database driver has errors of its own)
                    status, text = 500, repr(error)
            ERRORS.inc()
            log.warning("request refused", extra=about(request=call, status=status, error=text))
            return Response(_json({"error": text}, spaced=True), status, media_type=_TEXT)

        return answer


async def _body(request: Request) -> Object:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise Failed(400, f"read-body: longer than {MAX_BODY} bytes")
    with _understanding():
        return parse(data)


@contextmanager
def _understanding() -> Iterator[None]:
    """Inside, the request is read: what is malformed is the client's fault."""
    try:
        yield
    except Malformed as error:
        raise Failed(400, f"unmarshal-request: {error}") from None


async def _unrouted(_: Request, error: Exception) -> Response:
    """404 and 405 as Go's router answers them."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    text = "404 page not found\n" if status == 404 else "Method Not Allowed\n"
    return Response(text, status, headers={**headers, "X-Content-Type-Options": "nosniff"}, media_type=_TEXT)


def _encode(lease: Lease) -> dict[str, str]:
    return {
        "underlay_ip": str(lease.underlay),
        "overlay_subnet": str(lease.subnet),
        "overlay_hardware_addr": lease.mac,
    }


def _json(value: object, *, spaced: bool = False) -> str:
    """As the original writes it: answers without blanks, errors with one after the colon."""
    return json.dumps(value, separators=None if spaced else (",", ":"), ensure_ascii=False)


def _ipv4(text: str) -> IPv4Address | None:
    try:
        return IPv4Address(text)
    except ValueError:
        return None


def _is_cidr(text: str) -> bool:
    """Whether it is an address with a prefix length; a mask, which Python also takes, is none."""
    try:
        IPv4Interface(text)
    except ValueError:
        return False
    return text.rpartition("/")[2].isdecimal()
