"""`/iptables-c2c-logging` on the enforcer's socket: whether flows that policies let in are logged (cell.md 6.6).

As the original's, except that the answer to PUT comes when the rules are so, not with the next change of policies.
"""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.decode import Malformed
from bus.local import json_body
from services.enforcer.reconciler import NotReady, Reconciler


class LoggingApi:
    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    def routes(self) -> list[Route]:
        return [
            Route("/iptables-c2c-logging", self.get, methods=["GET"]),
            Route("/iptables-c2c-logging", self.put, methods=["PUT"]),
        ]

    async def get(self, _: Request) -> Response:
        return self._enabled()

    async def put(self, request: Request) -> Response:
        try:
            body = await json_body(request, "logging")
        except Malformed:
            return _error("decoding request body as json")
        if "enabled" not in body:
            return _error("missing required key 'enabled'")
        try:
            enabled = body.flag("enabled")
        except Malformed:
            return _error("decoding request body as json")
        try:
            await self._reconciler.log_accepted(enabled)
        except NotReady as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        return self._enabled()

    def _enabled(self) -> Response:
        return _text({"enabled": self._reconciler.settings.log_accepted}, 200)


def _text(content: dict[str, Any], status: int) -> Response:
    return Response(json.dumps(content, separators=(",", ":")), status, media_type="application/json")


def _error(text: str) -> Response:
    """The original's answer, to the byte."""
    return Response(f'{{ "error": "{text}" }}', 400, media_type="application/json")
