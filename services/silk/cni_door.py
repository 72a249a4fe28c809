"""The CNI door of the silk worker itself, for those who run somebody else's agent: `silkbus-silk` (POST /cni).

It attaches and detaches, and no more: no policies, records or rules. The result is that of the original's silk-cni
(contract/cell.md 3.2). Whatever goes wrong is answered as a CNI error, with exit code 1.
"""

import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bus import cni
from bus.cni import Call, CniError
from bus.decode import Fields, Malformed
from bus.local import json_body
from bus.log import about
from bus.messages import Handle
from services.silk.addresses import Exhausted
from services.silk.attachments import Attachment, Conflict, NotAttached, Wanted
from services.silk.bandwidth import Bandwidth
from services.silk.cell import Cell, NoLease
from services.silk.links import GATEWAY, host_interface, host_mac, unicast_mac
from services.silk.namespace import NamespaceError

log = logging.getLogger(__name__)

MAX_BODY = 7 << 20

_CODES: dict[type[Exception], int] = {
    NoLease: cni.TRY_AGAIN_LATER,
    Exhausted: cni.TRY_AGAIN_LATER,
    Conflict: cni.INVALID_ENVIRONMENT,
    NamespaceError: cni.INVALID_ENVIRONMENT,
    NotAttached: cni.UNKNOWN_CONTAINER,
    Malformed: cni.INVALID_CONFIG,
    OSError: cni.IO_FAILURE,
}


class CniDoor:
    """One call of the plugin becomes one of the cell's."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    async def post(self, http: Request) -> Response:
        body = await json_body(http, "POST /cni", limit=MAX_BODY)
        try:
            call = cni.parse(body)
            return JSONResponse({"exit": 0, "stdout": await self._answer(call)})
        except CniError as error:
            log.warning("CNI call failed", extra=about(code=error.code, error=f"{error} {error.details}".strip()))
            return JSONResponse({"exit": 1, "stdout": error.output()})

    async def _answer(self, call: Call) -> str:
        try:
            match call.command:
                case "ADD":
                    return _result(call, await self._cell.attach(_wanted(call)))
                case "DEL":
                    await self._cell.detach(call.handle, None, interface=call.ifname)
                case "CHECK":
                    await self._check(call)
                case "STATUS":
                    self._status(call)
                case "GC":
                    await self._keep_only(call)
            return ""
        except tuple(_CODES) as error:
            code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
            raise CniError(code, str(error), version=call.version) from error

    async def _check(self, call: Call) -> None:
        found = await self._cell.check(call.handle, call.netns, call.ifname)
        previous = call.config.get("prevResult")
        ips = previous.get("ips") if isinstance(previous, dict) else None
        said = {str(ip.get("address")).partition("/")[0] for ip in ips if isinstance(ip, dict)} if ips else set()
        if said and str(found.address) not in said:
            raise NotAttached(f"its address is {found.address}, prevResult has {', '.join(sorted(said))}")

    def _status(self, call: Call) -> None:
        try:
            self._cell.accepting()
        except NoLease as error:
            raise CniError(cni.NOT_AVAILABLE, str(error), version=call.version) from None

    async def _keep_only(self, call: Call) -> None:
        """Detach what this network's runtime attached and does not name any more; others are not touched."""
        valid = call.valid_attachments()
        for note in await self._cell.notes():
            if note.network == call.config["name"] and (note.handle, note.interface) not in valid:
                await self._cell.detach(Handle(note.handle), note.address)


def _wanted(call: Call) -> Wanted:
    wishes = Fields(cni.wishes(Fields(call.config.get("runtimeConfig") or {}, "runtimeConfig"), call.arguments), "CNI")
    return Wanted(
        call.handle,
        call.netns,
        call.ifname,
        wishes.address("address") if "address" in wishes else None,
        unicast_mac(wishes) if "mac" in wishes else None,
        Bandwidth.decode(wishes.mapping("bandwidth")) if "bandwidth" in wishes else None,
        str(call.config["name"]),
    )


def _result(call: Call, attachment: Attachment) -> str:
    dns: dict[str, Any] = dict(call.config.get("dns", {}))
    return cni.output(
        cni.veth_result(
            call.version,
            ifname=call.ifname,
            netns=call.netns,
            interface=host_interface(attachment.address),
            mac=host_mac(attachment.address),
            peer_mac=attachment.mac,
            mtu=attachment.mtu,
            address=str(attachment.address),
            gateway=str(GATEWAY),
            dns=dns,
        )
    )
