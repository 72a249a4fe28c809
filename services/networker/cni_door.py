"""The CNI front door: one call of the plugin becomes one call of the workflow, and its outcome CNI's answer."""

import logging
from typing import Any

from prometheus_client import Histogram
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.decode import Malformed
from bus.local import json_body
from bus.log import about
from services.networker import cni
from services.networker.attachments import Attachments
from services.networker.cni import CniError, Request
from services.networker.dns import nameservers
from services.networker.errors import Conflict, Failed, NotAttached, Rejected, Unavailable
from services.networker.record import Attachment

log = logging.getLogger(__name__)

SECONDS = Histogram("silkbus_networker_cni_seconds", "Duration of CNI calls", ["command", "outcome"])
# The configuration has at most 1 MiB; as a JSON text within JSON it may grow six-fold.
MAX_BODY = 7 << 20


class CniDoor:
    """POST /cni, as docs/design.md has it. Whatever goes wrong is answered as a CNI error, with exit code 1."""

    def __init__(self, attachments: Attachments, dns_servers: tuple[str, ...] = ()) -> None:
        self._attachments = attachments
        self._dns_servers = dns_servers

    def routes(self) -> list[Route]:
        return [Route("/cni", self.post, methods=["POST"])]

    async def post(self, http: HttpRequest) -> Response:
        call = await json_body(http, "POST /cni", limit=MAX_BODY)
        try:
            request = cni.parse(call)
        except CniError as error:
            log.warning("CNI call refused", extra=about(code=error.code, error=f"{error} {error.details}"))
            return JSONResponse({"exit": 1, "stdout": error.output()})
        with SECONDS.time() as timer:
            try:
                stdout = await self._answer(request)
            except CniError as error:
                timer.labels(request.command, "failed")
                fields = about(command=request.command, handle=request.handle, code=error.code, error=str(error))
                log.warning("CNI call failed", extra=fields)
                return JSONResponse({"exit": 1, "stdout": error.output()})
            timer.labels(request.command, "done")
        return JSONResponse({"exit": 0, "stdout": stdout})

    async def _answer(self, request: Request) -> str:
        try:
            match request.command:
                case "ADD":
                    return await self._add(request)
                case "DEL":
                    await self._remove(request)
                case "CHECK":
                    await self._check(request)
                case "STATUS":
                    await self._status(request)
                case "GC":
                    await self._attachments.keep_only(str(request.config["name"]), request.valid_attachments())
            return ""
        except CniError:
            raise
        except Exception as error:
            code, text = _told(error)
            if code == cni.INTERNAL and not isinstance(error, Failed):
                log.exception("unexpected error", extra=about(command=request.command, handle=request.handle))
            raise CniError(code, text, version=request.version) from error

    async def _add(self, request: Request) -> str:
        if request.chained == (request.config.get("prevResult") is None):
            problem = (
                "missing, although this plugin is configured as `chained`: another must attach the container before it"
                if request.chained
                else "silkbus-cni attaches the container itself, so it must be the first plugin of its chain; set "
                "`chained` to true in its configuration where another plugin attaches"
            )
            raise CniError(cni.INVALID_CONFIG, f"prevResult: {problem}", version=request.version)
        dns = self._dns(request)
        attachment = await self._attachments.add(request.attachment())
        return cni.result(attachment, request.version, dns)

    def _dns(self, request: Request) -> dict[str, Any]:
        own = dict(request.config.get("dns", {}))
        try:
            servers = nameservers(None, request.config, () if request.chained else self._dns_servers)
        except Malformed as error:
            raise CniError(cni.INVALID_CONFIG, str(error), version=request.version) from None
        return own | ({"nameservers": list(servers)} if servers else {})

    async def _remove(self, request: Request) -> None:
        # Of a chained one without a record there is nothing of the silk worker's.
        unrecorded = Attachment(request.handle, request.netns, request.ifname, "", result={})
        await self._attachments.remove(
            request.handle, request.netns or None, request.ifname, unrecorded if request.chained else None
        )

    async def _check(self, request: Request) -> None:
        found = await self._attachments.check(request.attachment())
        if (problem := cni.contradiction(request.config, found)) is not None:
            raise CniError(cni.UNKNOWN_CONTAINER, problem, version=request.version)

    async def _status(self, request: Request) -> None:
        try:
            await self._attachments.ready(with_silk=not request.chained)
        except (Unavailable, Failed) as error:
            raise CniError(cni.NOT_AVAILABLE, str(error), version=request.version) from None


def _told(error: Exception) -> tuple[int, str]:
    """CNI's code and text for what the workflow raised."""
    match error:
        case Unavailable():
            return cni.TRY_AGAIN_LATER, str(error)
        case Conflict():
            return cni.INVALID_ENVIRONMENT, str(error)
        case Rejected():
            return cni.INVALID_CONFIG, str(error)
        case NotAttached():
            return cni.UNKNOWN_CONTAINER, str(error)
        case OSError():
            return cni.IO_FAILURE, f"the container's record cannot be kept: {error}"
        case Failed() | Malformed():
            return cni.INTERNAL, str(error)
    return cni.INTERNAL, f"unexpected error: {error!r}; see the log of silkbus-networker"
