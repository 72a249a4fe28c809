"""The silk worker's process: its settings, its connection, its socket, around one `Cell`."""

from bus.connection import connect
from bus.local import Health, application, serving_privately
from bus.log import setup
from bus.messages import cell_name
from bus.process import KernelThread, run
from bus.settings import from_command_line
from bus.tables import LEASES, Replica
from services.silk.cell import Cell
from services.silk.client import LeaseClient
from services.silk.http import routes
from services.silk.settings import WorkerSettings


async def work(settings: WorkerSettings) -> None:
    """Run the worker for ever."""
    name = cell_name(settings.cell)
    kernel = KernelThread("silk-kernel")
    try:
        async with connect(settings.nats, role="cell", name=name, credentials=settings.nats_credentials) as connection:
            client = LeaseClient(connection, name, settings.underlay, settings.overlay_network)
            replica = Replica(connection, LEASES, cache=settings.cache(LEASES.name, "silk"))
            cell = Cell(settings, client, replica, kernel)
            health = Health()
            cell.watch(health)
            async with serving_privately(application(routes(cell), health), settings.socket("silk")):
                await cell.run()
    finally:
        kernel.close()


def main() -> None:
    settings = from_command_line(
        WorkerSettings, "silkbus-silk-worker", "Keeps a cell's overlay and attaches its containers."
    )
    setup("silk-worker", settings.log_level, cell=settings.cell)
    run(lambda: work(settings))


if __name__ == "__main__":
    main()
