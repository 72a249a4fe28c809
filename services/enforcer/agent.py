"""The enforcer's process: the fence first, then the tables, the cell's containers and the private socket."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus import log as logs
from bus import watchdog
from bus.connection import connect
from bus.decode import Fields, Malformed
from bus.local import Health, Service, application, json_body, serving_privately
from bus.log import about
from bus.messages import Container, Handle, Revision, Stage, cell_name
from bus.process import KernelThread, run
from bus.records import Records
from bus.settings import from_command_line
from bus.tables import LEASES, POLICIES, SECURITY_GROUPS, Replica
from services.enforcer import following
from services.enforcer.counters import Counters
from services.enforcer.denied import DeniedEvents
from services.enforcer.explain import Explainer
from services.enforcer.explain_door import ExplainApi, ExplainOnBus
from services.enforcer.foreign_api import ForeignApi, forcing
from services.enforcer.logging_door import LoggingApi
from services.enforcer.reconciler import NotReady, Reconciler
from services.enforcer.report import Reporter
from services.enforcer.settings import EnforcerSettings
from services.enforcer.traffic import Traffic
from services.enforcer.worker_leases import WorkerLeases

log = logging.getLogger(__name__)


def enforceable(container: Container) -> Container:
    """The container, if rules for it can be made. Raises Malformed."""
    where = f"container {container.handle!r}"
    address = container.address
    if address is None:
        raise Malformed(f"{where}: address: missing; a container is admitted once it is attached")
    if address.is_unspecified or address.is_multicast or address.is_loopback or address.is_reserved:
        raise Malformed(f"{where}: address: {address} cannot be a container's")
    return container


class Api:
    """What the enforcer answers on its socket (docs/design.md, interfaces)."""

    def __init__(self, reconciler: Reconciler, table: Callable[[], str], groups: Callable[[], str]) -> None:
        self._reconciler = reconciler
        self._table = table
        self._groups = groups
        self.instance = secrets.token_hex(8)

    def routes(self) -> list[Route]:
        return [
            Route("/admit", self.admit, methods=["POST"]),
            Route("/forget", self.forget, methods=["POST"]),
            Route("/sync", self.sync, methods=["POST"]),
            Route("/state", self.state, methods=["GET"]),
        ]

    async def admit(self, request: Request) -> Response:
        body = await json_body(request, "admit")
        container = enforceable(Container.decode(body.mapping("container"), "admit: container"))
        return await self._answer(self._reconciler.admit(container))

    async def forget(self, request: Request) -> Response:
        body: Fields = await json_body(request, "forget")
        return await self._answer(self._reconciler.forget(Handle(body.text("handle"))))

    async def sync(self, _: Request) -> Response:
        return await self._answer(self._reconciler.sync())

    async def state(self, _: Request) -> Response:
        reconciler = self._reconciler
        return JSONResponse(
            {
                "instance": self.instance,
                "revision": reconciler.revision,
                "table": self._table(),
                "containers": reconciler.containers,
                "applied_at": reconciler.applied_at.isoformat() if reconciler.applied_at else None,
                "problem": reconciler.problem,
                "faults": reconciler.faults,
                "security_groups": self._groups(),
            }
        )

    async def _answer(self, work: Awaitable[Revision]) -> Response:
        try:
            revision = await work
        except NotReady as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        return JSONResponse({"instance": self.instance, "revision": revision})


def recorded(records: Records) -> list[Container]:
    """The containers to enforce for at start: the ready ones. One for which no rules can be made is reported, no more.

    One being attached is admitted, or admitted again, before it is answered; one being removed was forgotten, and
    nobody would say so again: its address would keep its app's rules and tag for the next container.
    """
    usable = []
    for container in records.all():
        if container.stage is not Stage.READY or container.address is None:
            continue
        try:
            usable.append(enforceable(container))
        except Malformed as error:
            log.error("container not enforced", extra=about(handle=container.handle, error=str(error)))
    return usable


async def serve(settings: EnforcerSettings) -> None:
    """Run the enforcer until cancelled."""
    worker = Service("silk", settings.socket("silk"))
    kernel, counting, looking = KernelThread("kernel"), KernelThread("counters"), KernelThread("explain")
    reconciler = Reconciler(settings, kernel)
    try:
        await reconciler.open()
        reconciler.restore(await kernel.run(recorded, Records(settings.containers_dir)))
        async with connect(
            settings.nats, role="cell", name=settings.cell, credentials=settings.nats_credentials
        ) as connection:
            policies = Replica(connection, POLICIES, cache=settings.cache("policies", "enforcer"))
            leases = (
                WorkerLeases(worker)
                if settings.leases_from == "worker"
                else Replica(connection, LEASES, cache=settings.cache("leases", "enforcer"))
            )
            groups = Replica(connection, SECURITY_GROUPS, cache=settings.cache("security_groups", "enforcer"))
            policies.listen(reconciler.update_policies)
            leases.listen(reconciler.update_leases)
            reporter = Reporter(connection, settings.cell, policies, reconciler)
            health = Health()
            health.check("kernel", lambda: reconciler.problem)
            api = Api(reconciler, lambda: str(policies.state), lambda: str(groups.state))
            explainer = Explainer(reconciler, looking, settings.cell)
            await ExplainOnBus(connection, explainer, settings.cell).listen()
            events = DeniedEvents(connection, cell_name(settings.cell), settings.denied_events_per_sec)
            traffic = Traffic(settings, reconciler.model, kernel, events)
            counters = Counters(reconciler, counting)
            doors = (api, ExplainApi(explainer, settings.cell), LoggingApi(reconciler), counters)
            foreign = ForeignApi(reconciler, dynamic=settings.dynamic_security_groups)
            app = application([route for door in doors for route in door.routes()], health)
            async with (
                asyncio.TaskGroup() as tasks,
                serving_privately(app, settings.socket("enforcer")),
                forcing(foreign, settings.force_policy_poll_cycle_host, settings.force_policy_poll_cycle_port),
            ):
                for each in (policies, leases, reconciler, reporter, traffic, counters):
                    tasks.create_task(each.run())
                watchdog.ready()
                if settings.dynamic_security_groups:
                    groups.listen(reconciler.update_security_groups)
                    tasks.create_task(groups.run())
                await policies.usable()
                await leases.usable()
                if settings.dynamic_security_groups:
                    await following.first(groups, reconciler)
                    tasks.create_task(following.follow(groups, reconciler))
                log.info("in sync", extra=about(policies=str(policies.state), leases=str(leases.state)))
                reconciler.begin()
                await asyncio.Event().wait()
    finally:
        await worker.close()
        for thread in (kernel, counting, looking):
            thread.close()


def main() -> None:
    settings = from_command_line(EnforcerSettings, "silkbus-enforcer", "Enforces policies on one cell.")
    logs.setup("enforcer", settings.log_level, cell=settings.cell)
    run(lambda: serve(settings))
