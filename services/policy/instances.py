"""Where the instances of two apps run, and what their cells say of a flow between them: asked of all cells at once.

Nobody but a cell knows which containers it has. All cells that hold a lease are asked, and all answer, most of them
that they have neither app; so the answer is complete as soon as the last has answered, and it is known who has not.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from bus import subjects
from bus.connection import Connection
from bus.decode import Malformed
from bus.explaining import MAX_TARGETS, CellAnswer, Question
from bus.log import about
from bus.messages import CellName
from bus.wire import decode
from services.policy.explain import Flow

log = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0
"""How long cells are waited for. One that answers at all does so in some milliseconds (docs/explain.md)."""
PROBE_SECONDS = 6.0
"""As before, where they are to try connections."""
MAX_QUESTIONS = 8
"""Questions under way at once; more wait, since each costs every cell a look into its kernel."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The answers, and which cells that hold a lease have given none."""

    answers: tuple[CellAnswer, ...]
    silent: tuple[CellName, ...]

    @property
    def cells(self) -> int:
        """How many were asked."""
        return len(self.answers) + len(self.silent)


class _Pending:
    def __init__(self, cells: Collection[CellName]) -> None:
        self.awaited = set(cells)
        self.answers: dict[CellName, CellAnswer] = {}
        self.complete = asyncio.Event()


class Instances:
    """Asks the cells, once it `listen`s; `leased` gives the cells that hold a lease, None while that is not known."""

    def __init__(self, connection: Connection, leased: Callable[[], Collection[CellName] | None]) -> None:
        self._connection = connection
        self._leased = leased
        self._pending: dict[str, _Pending] = {}
        self._slots = asyncio.Semaphore(MAX_QUESTIONS)

    async def listen(self) -> None:
        """Hear answers from now on, for as long as there is the connection."""
        await self._connection.listen(subjects.cell("*", "explained"), self._on_answer)

    async def ask(self, flow: Flow, *, probe: bool = False) -> Asked | None:
        """What the cells say of a flow, or None while they cannot be asked.

        With `probe` the source's instances try to connect to the destination's, to at most MAX_TARGETS of them.
        """
        question = Question("", flow.source, flow.destination, flow.protocol, flow.port)
        asked = await self._ask(question, ANSWER_SECONDS)
        if asked is None or not probe:
            return asked
        targets = _addresses(asked)[:MAX_TARGETS]
        if not targets:
            return asked
        return await self._ask(replace(question, targets=targets), PROBE_SECONDS) or asked

    async def _ask(self, question: Question, seconds: float) -> Asked | None:
        async with self._slots:
            leased = self._leased()
            if leased is None:
                return None
            cells = sorted(set(leased))
            question = replace(question, id=secrets.token_hex(16))
            pending = self._pending[question.id] = _Pending(cells)
            try:
                if not await self._connection.publish(subjects.EXPLAIN, question.encode()):
                    return None
                if cells:
                    async with asyncio.timeout(seconds):
                        await pending.complete.wait()
            except TimeoutError:
                pass
            finally:
                del self._pending[question.id]
        answers = tuple(pending.answers[cell] for cell in sorted(pending.answers))
        return Asked(answers, tuple(cell for cell in cells if cell not in pending.answers))

    def _on_answer(self, subject: str, data: bytes) -> None:
        fields = decode(data, subject)
        pending = self._pending.get(fields.text("id", max_length=64))
        if pending is None:
            return  # of another server's question, or too late
        cell = subject.split(".")[2]
        if cell not in pending.awaited:
            return  # it holds no lease, so it has no containers that anybody reaches
        try:
            answer = CellAnswer.decode(cell, fields)
        except Malformed as error:
            log.warning("a cell's answer is not understood", extra=about(cell=cell, error=str(error)))
            return
        pending.answers[answer.cell] = answer
        if len(pending.answers) == len(pending.awaited):
            pending.complete.set()


def _addresses(asked: Asked) -> tuple[IPv4Address, ...]:
    return tuple(instance.address for answer in asked.answers for instance in answer.destinations)
