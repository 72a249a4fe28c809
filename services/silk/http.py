"""The worker's calls on the cell's private socket (docs/design.md, "Cell, on Unix sockets")."""

import logging
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.decode import Fields
from bus.local import json_body
from bus.log import about
from bus.messages import Handle
from bus.records import file_name
from services.silk.addresses import Exhausted
from services.silk.attachments import Conflict, Wanted
from services.silk.bandwidth import Bandwidth
from services.silk.cell import Cell, NoLease
from services.silk.cni_door import CniDoor
from services.silk.links import unicast_mac
from services.silk.namespace import NamespaceError
from services.silk.settings import MAX_INTERFACE_NAME

log = logging.getLogger(__name__)

_STATUS: dict[type[Exception], int] = {
    NamespaceError: 400,
    Conflict: 409,
    NoLease: 503,
    Exhausted: 503,
    OSError: 500,
}


def routes(cell: Cell) -> list[Route]:
    """The worker's calls, all of docs/design.md."""

    async def overlay(_: Request) -> Response:
        lease, device = cell.overlay()
        return JSONResponse({"overlay_subnet": str(lease.subnet), "mtu": device.mtu})

    async def attach(request: Request) -> Response:
        fields = await json_body(request, "attach")
        attachment = await cell.attach(
            Wanted(
                handle=_handle(fields),
                netns=fields.text("netns"),
                interface=_interface(fields),
                address=fields.address("address") if "address" in fields else None,
                mac=unicast_mac(fields) if "mac" in fields else None,
                bandwidth=Bandwidth.decode(fields.mapping("bandwidth")) if "bandwidth" in fields else None,
            )
        )
        return JSONResponse(attachment.encode())

    async def detach(request: Request) -> Response:
        fields = await json_body(request, "detach")
        await cell.detach(_handle(fields), fields.address("address") if "address" in fields else None)
        return JSONResponse({})

    async def drain(_: Request) -> Response:
        return JSONResponse({"containers": await cell.drain()})

    async def teardown(_: Request) -> Response:
        return JSONResponse({"failed": await cell.tear_down()})

    async def problems(_: Request) -> Response:
        found = await cell.problems()
        return JSONResponse({"problems": [{"name": each.name, "text": each.text} for each in found]})

    async def leases(_: Request) -> Response:
        return JSONResponse({"leases": [lease.encode() for lease in cell.leases()]})

    return [
        Route("/", _answered(overlay)),
        Route("/problems", _answered(problems)),
        Route("/leases", _answered(leases)),
        Route("/cni", CniDoor(cell).post, methods=["POST"]),
        Route("/drain", _answered(drain), methods=["POST"]),
        Route("/teardown", _answered(teardown), methods=["POST"]),
        Route("/attach", _answered(attach), methods=["POST"]),
        Route("/detach", _answered(detach), methods=["POST"]),
    ]


def _answered(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, with the errors that tell the caller what is wrong as answers."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except tuple(_STATUS) as error:
            status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
            level = logging.DEBUG if request.method == "GET" else logging.WARNING
            log.log(level, "request refused", extra=about(request=request.url.path, status=status, error=str(error)))
            return JSONResponse({"error": str(error)}, status_code=status)

    return answer


def _handle(fields: Fields) -> Handle:
    handle = fields.text("handle")
    if not handle.isprintable():
        raise fields.malformed("handle", "has characters that cannot be printed")
    file_name(Handle(handle))  # what has no record's name cannot be a container
    return Handle(handle)


def _interface(fields: Fields) -> str:
    name = fields.text("ifname")
    # What the kernel refuses as a name (dev_valid_name in net/core/dev.c).
    if len(name) > MAX_INTERFACE_NAME or name in (".", "..") or any(c in "/:" or c.isspace() for c in name):
        raise fields.malformed("ifname", f"{name!r} is not an interface name of 1 to {MAX_INTERFACE_NAME} characters")
    if not name.isascii() or not name.isprintable():
        raise fields.malformed("ifname", f"{name!r} has characters other than printable ASCII")
    return name
