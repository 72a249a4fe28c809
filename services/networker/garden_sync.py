"""What a container is called in logs may change while it lives: Diego sets Garden's property `log_config` anew.

So Garden is asked every so often (contract/cell.md 5.10), and where the property says something else than the record's
metadata, the record gets it, and with it the enforcer and the metadata store. Nothing else is changed: a container that
only one of both has is none of this module's business.
"""

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_never, wait_exponential_jitter

from bus.decode import Malformed
from bus.log import about
from bus.messages import Container, Stage
from services.networker.attachments import Attachments
from services.networker.errors import Conflict, Failed, NotAttached, Unavailable
from services.networker.garden_client import GardenClient, GardenError
from services.networker.record import Attachment

log = logging.getLogger(__name__)

PROPERTY = "log_config"
FIRST_WAIT = 1.0


def identity(text: object) -> tuple[Any, ...] | None:
    """What of a log_config counts: two that differ in the order of keys, or in keys nobody reads, are the same.

    None for what is no log_config: not a text, not JSON, not an object.
    """
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    # As Go has them where they are left out.
    return (value.get("guid") or "", value.get("index") or 0, value.get("source_name") or "", value.get("tags") or {})


class GardenSync:
    def __init__(self, attachments: Attachments, garden: GardenClient, interval: float) -> None:
        self._attachments = attachments
        self._garden = garden
        self._interval = interval

    async def run(self) -> None:
        """Compare every `interval` seconds, sooner at first if Garden cannot be asked. Until cancelled."""
        while True:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(GardenError),
                stop=stop_never,
                wait=wait_exponential_jitter(initial=min(FIRST_WAIT, self._interval), max=self._interval),
                before_sleep=_say,
            ):
                with attempt:
                    await self._pass()
            await asyncio.sleep(self._interval)

    async def _pass(self) -> None:
        await self._garden.ping()
        handles = await self._garden.handles()
        for record in await self._attachments.all():
            if record.handle in handles and record.stage is Stage.READY:
                await self._follow(record)

    async def _follow(self, record: Container) -> None:
        properties = await self._garden.properties(record.handle)
        try:
            wanted = None if properties is None else properties.optional_text(PROPERTY, max_length=1 << 16)
        except Malformed as error:
            log.warning("its log_config is not taken over", extra=about(handle=record.handle, error=str(error)))
            return
        if wanted is None:
            return
        said = identity(wanted)
        if said is None:
            fields = about(handle=record.handle, error="the property is not a JSON object")
            log.warning("its log_config is not taken over", extra=fields)
            return
        if said == identity(record.metadata.get(PROPERTY)):
            return
        try:
            await self._attachments.change(record.handle, lambda old: _called(old, wanted))
        except NotAttached:
            return  # it went while we asked
        except (Unavailable, Failed, Conflict, Malformed, OSError) as error:
            fields = about(handle=record.handle, error=str(error))
            log.warning("its new log_config is not taken over yet", extra=fields)
            return
        log.info("log_config changed", extra=about(handle=record.handle))


def _called(attachment: Attachment, log_config: str) -> Attachment:
    metadata = {**attachment.identity.metadata, PROPERTY: log_config}
    return replace(attachment, identity=replace(attachment.identity, metadata=metadata))


def _say(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning(
        "log identities not compared, trying again", extra=about(error=str(error), attempt=state.attempt_number)
    )
