"""The networker of a cell: front doors for container runtimes, container records, the order in which things happen."""

import asyncio
import dataclasses
import logging
from contextlib import AsyncExitStack
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus import watchdog
from bus.connection import connect
from bus.decode import Malformed
from bus.local import Health, Service, application, serving_privately
from bus.log import about, setup
from bus.messages import cell_name
from bus.process import KernelThread, run
from bus.records import Records
from bus.settings import CellSettings, from_command_line, setting
from services.networker import dns, garden_client, metadata_store
from services.networker.announcer import Announcer
from services.networker.attachments import Attachments
from services.networker.cni_door import CniDoor
from services.networker.garden_client import GardenClient
from services.networker.garden_door import GardenDoor
from services.networker.garden_sync import GardenSync
from services.networker.metadata_store import MetadataStore, ObservedRecords
from services.networker.neighbours import Neighbours
from services.networker.outbox import Outbox
from services.networker.sweep import Sweep

log = logging.getLogger(__name__)

LONGEST_CALL = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NetworkerSettings(CellSettings):
    """Settings of the networker."""

    attach_timeout: float = setting("seconds the silk worker, or the CNI plugins, have for a link", 10.0)
    admit_timeout: float = setting("seconds the enforcer has for a container's rules", 20.0)
    dns_servers: tuple[str, ...] = setting("DNS servers of containers whose network configuration names none", ())
    metadata_store: Path | None = setting(
        "file in which the original's metadata store is kept in step; off if none", None
    )
    metadata_store_owner: str | None = setting("user whose the metadata store is to be", None)
    metadata_store_group: str | None = setting("group whose the metadata store is to be", None)
    garden_address: str | None = setting(
        "Garden's socket, or HOST:PORT, to learn new log_config from; off if none", None
    )
    garden_sync_interval: float = setting("seconds after which Garden is asked again", 30.0)

    def __post_init__(self) -> None:
        CellSettings.__post_init__(self)
        cell_name(self.cell)
        for server in self.dns_servers:
            dns.check(server)
        metadata_store.owner(self.metadata_store_owner, self.metadata_store_group)
        if self.garden_address is not None:
            garden_client.check_address(self.garden_address)
        if self.garden_sync_interval <= 0:
            raise Malformed("garden_sync_interval: must be more than 0")
        for name in ("attach_timeout", "admit_timeout"):
            if not 0 < getattr(self, name) <= LONGEST_CALL:
                raise Malformed(f"{name}: must be more than 0 and at most {LONGEST_CALL:g}, for runtimes wait 60 s")


async def serve(settings: NetworkerSettings) -> None:
    """Serve until cancelled. What is under way then gets a few seconds; the rest is for the next start's sweep."""
    disk = KernelThread("disk")
    cell = cell_name(settings.cell)
    silk = Service("silk", settings.socket("silk"))
    enforcer = Service("enforcer", settings.socket("enforcer"))
    neighbours = Neighbours(
        silk, enforcer, attach_timeout=settings.attach_timeout, admit_timeout=settings.admit_timeout
    )
    outbox = Outbox(settings.state_dir / "networker" / "events", disk)
    health = Health()
    store = _metadata_store(settings, health)
    records = Records(settings.containers_dir)
    if store is not None:
        records = ObservedRecords(settings.containers_dir, store.observe)
    attachments = Attachments(cell, records, neighbours, outbox, disk)
    garden = None if settings.garden_address is None else GardenClient(settings.garden_address)

    async def containers(_: Request) -> Response:
        return JSONResponse({"containers": [record.encode() for record in await attachments.all()]})

    async with AsyncExitStack() as stack:
        stack.callback(disk.close)
        stack.push_async_callback(silk.close)
        stack.push_async_callback(enforcer.close)
        if garden is not None:
            stack.push_async_callback(garden.close)
        connection = await stack.enter_async_context(
            connect(settings.nats, role="cell", name=cell, credentials=settings.nats_credentials)
        )
        await attachments.load()
        if store is not None:
            stack.push_async_callback(store.close)
            store.load(await attachments.all())
        routes = [
            *CniDoor(attachments, settings.dns_servers).routes(),
            *GardenDoor(attachments, disk, settings.dns_servers).routes(),
            Route("/containers", containers),
        ]
        socket = settings.socket("networker")
        await stack.enter_async_context(serving_privately(application(routes, health), socket))
        log.info("serving", extra=about(socket=str(socket)))
        watchdog.ready()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Sweep(attachments, disk).run())
            tasks.create_task(Announcer(connection, cell, outbox).run())
            if store is not None:
                tasks.create_task(store.run())
            if garden is not None:
                tasks.create_task(GardenSync(attachments, garden, settings.garden_sync_interval).run())


def _metadata_store(settings: NetworkerSettings, health: Health) -> MetadataStore | None:
    if settings.metadata_store is None:
        return None
    owner = metadata_store.owner(settings.metadata_store_owner, settings.metadata_store_group)
    store = MetadataStore(settings.metadata_store, owner)
    health.check("metadata store", store.problem)
    return store


def main() -> None:
    settings = from_command_line(NetworkerSettings, "silkbus-networker", "Front doors of a cell: Garden and CNI.")
    setup("networker", settings.log_level, cell=settings.cell)
    run(lambda: serve(settings))
