"""The silk worker's process: its settings, who leases it a subnet, its socket, around one `Cell`.

silkbus-silk-worker [--config FILE]             run
silkbus-silk-worker drain|teardown|fence …      services/silk/worker_commands.py
"""

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from bus import watchdog
from bus.connection import connect
from bus.local import Health, application, serving, serving_privately
from bus.log import setup
from bus.messages import cell_name
from bus.process import KernelThread, run
from bus.settings import from_command_line
from bus.tables import LEASES, Replica
from services.silk import worker_commands as commands
from services.silk.cell import Cell
from services.silk.client import LeaseClient
from services.silk.daemon_http import daemon_application
from services.silk.directory import Directory, Lessor
from services.silk.http import routes
from services.silk.original_controller import OriginalController, OriginalLeases, OriginalLessor
from services.silk.settings import WorkerSettings

PROGRAM = "silkbus-silk-worker"


@asynccontextmanager
async def leasing(settings: WorkerSettings) -> AsyncIterator[tuple[Lessor, Directory]]:
    """Who leases this cell its subnet, and who knows all leases: our controller on the bus, or the original's."""
    if settings.controller_url:
        ca, cert, key = settings.controller_ca, settings.controller_cert, settings.controller_key
        assert ca is not None and cert is not None and key is not None  # noqa: PT018, S101 (checked with the settings)
        original = OriginalController(settings.controller_url.rstrip("/"), ca, cert, key)
        yield OriginalLessor(original, settings), OriginalLeases(original)
        return
    name = cell_name(settings.cell)
    async with connect(settings.nats, role="cell", name=name, credentials=settings.nats_credentials) as connection:
        lessor = LeaseClient(connection, name, settings.underlay, settings.overlay_network, settings.single_ip_only)
        yield lessor, Replica(connection, LEASES, cache=settings.cache(LEASES.name, "silk"))


async def work(settings: WorkerSettings) -> None:
    """Run the worker for ever."""
    kernel = KernelThread("silk-kernel")
    try:
        async with AsyncExitStack() as stack:
            lessor, directory = await stack.enter_async_context(leasing(settings))
            cell = Cell(settings, lessor, directory, kernel)
            health = Health()
            cell.watch(health)
            app = application(routes(cell), health)
            await stack.enter_async_context(serving_privately(app, settings.socket("silk")))
            if settings.health_port:
                listener = stack.enter_context(socket.create_server(("127.0.0.1", settings.health_port)))
                listener.setblocking(False)
                await stack.enter_async_context(serving(daemon_application(cell), listener))
            watchdog.ready()
            await cell.run()
    finally:
        kernel.close()


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in commands.COMMANDS:
        sys.exit(commands.main(PROGRAM, sys.argv[1:], leasing))
    what = f"Keeps a cell's overlay and attaches its containers. Commands: {', '.join(commands.COMMANDS)} (see --help)."
    settings = from_command_line(WorkerSettings, PROGRAM, what)
    setup("silk-worker", settings.log_level, cell=settings.cell)
    run(lambda: work(settings))


if __name__ == "__main__":
    main()
