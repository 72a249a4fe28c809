"""What one policy server does for all of them, the one that leads: security groups, and the clean-up of policies.

Every server is ready to lead (`leadership`), so there is no separate process to run or to watch. Whatever fails here
is logged, counted and told by /readyz, and tried again at the next turn; the API does not depend on it.
"""

import asyncio
import dataclasses
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

from databases import Database
from prometheus_client import Gauge

from bus.log import about
from bus.tables.publisher import Mirrored
from services.policy import asg_syncer, cleanup
from services.policy.asg_syncer import SETTLING_SECONDS, Syncer
from services.policy.cc_api import Api
from services.policy.cleanup import Cleaner
from services.policy.cloud_controller import CloudController
from services.policy.identity import Unavailable
from services.policy.leadership import Deposed, Fence, Leadership
from services.policy.remote import Remote, present, trust
from services.policy.security_groups import SecurityGroups
from services.policy.store import Store
from services.policy.uaa import OwnToken
from services.policy.upkeep_settings import UpkeepSettings

log = logging.getLogger(__name__)

DUTY = "upkeep"
TRY_SECONDS = 30.0
"""How long the Cloud Controller may take for an answer: nobody waits for these, and long lists take it long."""

LEADS = Gauge("silkbus_upkeep_leader", "1 on the server that syncs security groups and cleans policies up")


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """The Cloud Controller, as upkeep asks it."""

    controller: Api
    internal: Api | None
    apps: CloudController


class Upkeep:
    """Runs the duties while this server leads. `cleaner` is for clean-ups that somebody asks for, on any server."""

    def __init__(
        self, database: Database, sources: Sources, groups: SecurityGroups, store: Store, settings: UpkeepSettings
    ) -> None:
        self.cleaner = Cleaner(store, sources.apps, max_percent=settings.cleanup_max_percent)
        self._leadership = Leadership(database, DUTY)
        self._sources = sources
        self._groups = groups
        self._settings = settings
        self._syncer: Syncer | None = None
        self._synced_at = 0.0
        self._troubles: dict[str, str] = {}

    async def run(self) -> None:
        """Lead when nobody else does, for ever."""
        await self._leadership.run(self._lead)

    def mirrored(self, mirrored: Mirrored) -> None:
        """To be told of the mirror of the security groups: a restored database is not what was last written."""
        if mirrored.reloaded and self._syncer is not None:
            self._syncer.reread()

    def state(self) -> str:
        """For people: who keeps security groups and policies up, and what is wrong with it."""
        if self._leadership.term is None:
            return "by another server"
        texts = [f"{what} failed, what was there is kept: {error}" for what, error in self._troubles.items()]
        if self._synced_at:
            texts.append(f"security groups as of {datetime.fromtimestamp(self._synced_at, UTC):%Y-%m-%dT%H:%M:%SZ}")
        return "; ".join(["by this server", *texts])

    async def _lead(self, fence: Fence) -> None:
        LEADS.set(1)
        self._synced_at = 0.0
        self._troubles.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                if self._settings.asg_poll_interval_seconds:
                    tasks.create_task(self._sync(fence))
                if self._settings.cleanup_interval:
                    tasks.create_task(self._clean(fence))
                await asyncio.Event().wait()
        finally:
            LEADS.set(0)

    async def _sync(self, fence: Fence) -> None:
        syncer = self._syncer = Syncer(self._sources.controller, self._sources.internal, self._groups)
        interval = float(self._settings.asg_poll_interval_seconds)
        while True:
            final = True

            async def turn() -> None:
                nonlocal final
                final = await syncer.sync(fence)
                self._synced_at = time.time()

            await self._try("the sync of security groups", turn)
            await asyncio.sleep(interval if final else min(interval, SETTLING_SECONDS))

    async def _clean(self, fence: Fence) -> None:
        async def turn() -> None:
            await self.cleaner.clean(fence=fence)

        while True:
            await asyncio.sleep(self._settings.cleanup_interval)
            await self._try("the clean-up of policies", turn)

    async def _try(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do one turn of a duty; what fails is for the next turn."""
        try:
            await work()
        except (Unavailable, Deposed, asg_syncer.Refused, cleanup.Refused) as error:
            problem = str(error)
        except Exception as error:
            log.exception("%s failed", what)
            problem = repr(error)
        else:
            problem = ""
        if problem != self._troubles.get(what, ""):
            if problem:
                log.error("%s failed, what was there is kept", what, extra=about(error=problem))
            else:
                log.info("%s succeeds again", what)
        self._troubles.pop(what, None)
        if problem:
            self._troubles[what] = problem


@asynccontextmanager
async def open_sources(settings: UpkeepSettings) -> AsyncIterator[Sources | None]:
    """The Cloud Controller, if there is one. Raises Malformed for files that cannot be used."""
    if not settings.cc_url:
        yield None
        return
    async with AsyncExitStack() as stack:

        def remote(name: str, url: str, tls: ssl.SSLContext) -> Remote:
            made = Remote(name, url, tls, try_seconds=TRY_SECONDS)
            stack.push_async_callback(made.close)
            return made

        skip = settings.skip_ssl_validation
        trusted = trust(settings.authorities, skip_validation=skip)
        token = OwnToken(remote("UAA", settings.uaa_address, trusted), settings.uaa_login)
        controller = remote("the Cloud Controller", settings.cc_url, trusted)
        internal = None
        if settings.cc_internal_url:
            tls = trust([settings.cc_internal_ca_cert] if settings.cc_internal_ca_cert else [], skip_validation=skip)
            if settings.cc_internal_client_cert and settings.cc_internal_client_key:
                present(tls, settings.cc_internal_client_cert, settings.cc_internal_client_key)
            internal = Api(remote("the Cloud Controller's internal API", settings.cc_internal_url, tls), token)
        yield Sources(Api(controller, token), internal, CloudController(controller, token, remember=0))
