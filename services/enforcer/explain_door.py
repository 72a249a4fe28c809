"""The two ways to ask this cell about a flow: `GET /explain` on its socket, and the question that goes to all cells.

On the socket `source` and `destination` are apps or addresses, and `protocol` may be icmp (with `type` and `code`); an
answer has the form of `bus.explaining.CellAnswer`. Over the bus both are apps, and the answer goes out under this
cell's name.
"""

import asyncio
import logging
from ipaddress import IPv4Address

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus import subjects
from bus.connection import Connection
from bus.decode import Malformed
from bus.explaining import CellAnswer, Question
from bus.log import about
from bus.messages import MAX_APP_ID, AppId, cell_name
from bus.wire import decode
from services.enforcer.explain import Explainer
from services.enforcer.viewpoint import CannotExplain, Flow

log = logging.getLogger(__name__)

MAX_QUESTIONS = 32
"""Questions from the bus that wait at once; who asks more is not answered."""
PARAMETERS = ("source", "destination", "protocol", "port", "type", "code")


class ExplainApi:
    def __init__(self, explainer: Explainer, cell: str) -> None:
        self._explainer = explainer
        self._cell = cell

    def routes(self) -> list[Route]:
        return [Route("/explain", self.explain, methods=["GET"])]

    async def explain(self, request: Request) -> Response:
        try:
            answer = await self._explainer.explain(_flow(request.query_params))
        except CannotExplain as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse({"cell": self._cell, **answer.encode()})


class ExplainOnBus:
    """Answers what is asked of all cells."""

    def __init__(self, connection: Connection, explainer: Explainer, cell: str) -> None:
        self._connection = connection
        self._explainer = explainer
        self._cell = cell_name(cell)
        self._answering: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Answer from now on."""
        await self._connection.listen(subjects.EXPLAIN, self._on_question)

    def _on_question(self, subject: str, data: bytes) -> None:
        question = Question.decode(decode(data, subject))
        if len(self._answering) >= MAX_QUESTIONS:
            log.warning("question not answered: too many wait", extra=about(subject=subject))
            return
        task = asyncio.create_task(self._answer(question))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, question: Question) -> None:
        try:
            answer = await self._explainer.answer(question)
        except Exception as error:  # whatever it is, it must not look as if this cell was away
            log.exception("question failed", extra=about(source=question.source, destination=question.destination))
            answer = CellAnswer(question.id, self._cell, self._explainer.revision, problem=repr(error)[:500])
        await self._connection.publish(subjects.cell(self._cell, "explained"), answer.encode())


def _flow(query: QueryParams) -> Flow:
    """The flow that a query asks about. Raises Malformed."""
    for name in query:
        if name not in PARAMETERS:
            raise Malformed(f"explain: {name}: no such parameter; there are {', '.join(PARAMETERS)}")
    protocol = query.get("protocol", "tcp")
    if protocol not in ("tcp", "udp", "icmp"):
        raise Malformed(f"explain: protocol: must be tcp, udp or icmp, not {protocol[:40]!r}")
    icmp = None
    port = 0
    if protocol == "icmp":
        icmp = (_number(query, "type", 0, 254, 8), _number(query, "code", 0, 254, 0))
    else:
        port = _number(query, "port", 1, 65535)
    return Flow(_end(query, "source"), _end(query, "destination"), protocol, port, icmp)


def _end(query: QueryParams, name: str) -> AppId | IPv4Address:
    text = query.get(name, "")
    if not 0 < len(text) <= MAX_APP_ID:
        raise Malformed(f"explain: {name}: must be an app or an address, of 1 to {MAX_APP_ID} characters")
    try:
        return IPv4Address(text)
    except ValueError:
        return AppId(text)


def _number(query: QueryParams, name: str, low: int, high: int, default: int | None = None) -> int:
    text = query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit() or not low <= int(text[:9]) <= high:
        raise Malformed(f"explain: {name}: must be a number in {low}..{high}, not {text!r}")
    return int(text)
