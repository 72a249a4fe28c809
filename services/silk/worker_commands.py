"""What scripts of a deployment ask of a cell's silk worker (contract/cell.md 5.6, 5.8, 5.9).

    drain      take no more containers and wait until there are none, or until the time is up
    teardown   give the lease back and remove the overlay device
    fence      take the overlay device down if the lease has run out, worker or no worker

They speak to the running worker; teardown and fence work without one, too. Exit code 0 is done, 1 is not (standard
error says why), 2 a wrong setting.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from bus.local import Refused, Service, Unreachable
from bus.log import setup
from bus.process import KernelThread
from bus.settings import SettingsError, load, refuse
from services.silk import tenure as tenures
from services.silk.cell import TRANSIENT, take_apart
from services.silk.directory import Directory, Lessor
from services.silk.network import CellNetwork
from services.silk.settings import WorkerSettings

COMMANDS = ("drain", "teardown", "fence")
DRAIN_TIMEOUT = 600.0
POLL_INTERVAL = 1.0
TEARDOWN_TIMEOUT = 30.0

Leasing = Callable[[WorkerSettings], AbstractAsyncContextManager[tuple[Lessor, Directory]]]


def main(program: str, arguments: Sequence[str], leasing: Leasing) -> int:
    """One of the commands; answers the exit code. `leasing` gives who leases, for when no worker runs."""
    parser = argparse.ArgumentParser(program, description="What scripts of a deployment ask of a cell's silk worker.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the worker's settings as a JSON object")
    parser.add_argument(
        "--timeout", type=float, default=DRAIN_TIMEOUT, help="seconds that drain waits for containers [%(default)g]"
    )
    options = parser.parse_args(arguments)
    try:
        settings = load(WorkerSettings, options.config, os.environ)
    except SettingsError as error:
        refuse(program, error)
    setup("silk-worker", settings.log_level, cell=settings.cell)
    match options.command:
        case "drain":
            failed = asyncio.run(drain(settings, options.timeout))
        case "teardown":
            failed = asyncio.run(tear_down(settings, leasing))
        case _:
            failed = asyncio.run(fence(settings))
    for text in failed:
        print(f"{program}: {options.command}: {text}", file=sys.stderr)
    return 1 if failed else 0


async def drain(settings: WorkerSettings, timeout: float) -> list[str]:
    """Have the worker take no more containers, and wait until none is left: what went wrong.

    One that does not run takes none: that is no error. Containers that stay are one, told after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    worker = Service("silk", settings.socket("silk"))
    try:
        while True:
            left = (await worker.call("POST", "/drain"))["containers"]
            if not left:
                return []
            if time.monotonic() >= end:
                return [f"{left} containers are still on this cell after {timeout:g} s: stop them, or go on without"]
            await asyncio.sleep(POLL_INTERVAL)
    except Unreachable:
        return []
    except Refused as error:
        return [str(error)]
    finally:
        await worker.close()


async def tear_down(settings: WorkerSettings, leasing: Leasing) -> list[str]:
    """Give the lease back and remove the device, by the worker if it runs: what went wrong."""
    worker = Service("silk", settings.socket("silk"))
    try:
        return [str(each) for each in (await worker.call("POST", "/teardown", timeout=TEARDOWN_TIMEOUT))["failed"]]
    except Refused as error:
        return [str(error)]
    except Unreachable:
        pass
    finally:
        await worker.close()
    kernel = KernelThread("silk-kernel")
    file = settings.state_dir / "silk" / "lease.json"
    failed = []
    try:
        async with leasing(settings) as (lessor, _):
            tenure = await kernel.run(tenures.load, file)
            try:
                # The controller takes back a lease that is named whole: one that is not remembered is asked for.
                tenure = tenure or await lessor.acquire()
            except TRANSIENT as error:
                failed.append(f"release subnet lease: {error}")
            failed += await take_apart(lessor, CellNetwork(settings), kernel, tenure)
        await kernel.run(file.unlink, missing_ok=True)
        return failed
    finally:
        kernel.close()


async def fence(settings: WorkerSettings) -> list[str]:
    """Take the device down if the remembered lease does not hold, or none is remembered: what went wrong.

    For a timer of the machine: a worker that is dead, or stopped, cannot fence its cell.
    """
    kernel = KernelThread("silk-kernel")
    try:
        remembered = await kernel.run(tenures.load, settings.state_dir / "silk" / "lease.json")
        if remembered is None or not remembered.holds:
            network = CellNetwork(settings)
            await kernel.run(network.fence)
        return []
    except TRANSIENT as error:
        return [str(error)]
    finally:
        kernel.close()
