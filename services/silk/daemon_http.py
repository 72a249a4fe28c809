"""What the original's silk-daemon answers on its port of the loopback address (contract/cell.md 5.5).

Its CNI plugin asks there for the subnet, its monitoring and shutdown whether anybody answers. Any method and path get
the same answer, and a cell that may not use the overlay gets none that could be taken for one.
"""

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from services.silk.cell import Cell, NoLease


def daemon_application(cell: Cell) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await _response(cell)(scope, receive, send)

    return answer


def _response(cell: Cell) -> Response:
    try:
        lease, device = cell.overlay()
    except NoLease as error:
        return JSONResponse({"error": str(error)}, status_code=503)
    return JSONResponse({"overlay_subnet": str(lease.subnet), "mtu": device.mtu})
