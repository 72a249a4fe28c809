"""What runs in a cell's container: its three services, each restarted when it ends, and the demo's apps.

A cell is a machine, and so one container: its services share a network namespace that must outlive each of them, and
enter the namespaces of its containers. Each service has of the container's capabilities only those that it needs
(`CAPABILITIES`); the apps are in network namespaces of their own, attached through the CNI plugin as by a container
runtime, and have none.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tenacity import (
    AsyncRetrying,
    before_sleep_log,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
)

from bus.log import about, setup
from compose.docker import apps, health

log = logging.getLogger(__name__)

RUN = Path("/run/silkbus")
METRICS_PORT = 9100
STOP_SECONDS = 15.0
READY_SECONDS = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
STEADY_SECONDS = 60.0
"""What ran this long had not failed at its start: its next pause is the first again."""

_OF_ALL = ("net_admin", "net_raw", "sys_admin", "sys_ptrace", "dac_override")
CAPABILITIES = {"silk-worker": _OF_ALL, "enforcer": _OF_ALL, "networker": (*_OF_ALL, "chown", "fowner")}
SOCKETS = {name: RUN / name / f"{name}.sock" for name in ("silk", "enforcer", "networker")}


@dataclass(frozen=True, slots=True)
class Supervised:
    """A program that is to run all the time."""

    name: str
    command: Sequence[str]

    async def run(self) -> None:
        """Start it whenever it is not there, pausing longer each time; cancelled, it is ended first."""
        clock = asyncio.get_running_loop().time
        pause = FIRST_PAUSE
        while True:
            begun = clock()
            process = await asyncio.create_subprocess_exec(*self.command, stdin=asyncio.subprocess.DEVNULL)
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                await self._end(process)
                raise
            pause = FIRST_PAUSE if clock() - begun > STEADY_SECONDS else min(2 * pause, LONGEST_PAUSE)
            log.warning("%s ended; it is started again", self.name, extra=about(code=code, seconds=pause))
            await asyncio.sleep(pause)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                log.warning("%s does not end; it is killed", self.name, extra=about(seconds=STOP_SECONDS))
                process.kill()


def confined(command: Sequence[str], capabilities: Sequence[str]) -> list[str]:
    """`command` with these capabilities at most, whatever it starts included (capabilities(7), bounding set)."""
    kept = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    return ["setpriv", "--no-new-privs", f"--bounding-set={kept}", *command]


def services() -> list[Supervised]:
    relayed = [f"{name}={socket}" for name, socket in SOCKETS.items()]
    relay = [sys.executable, "-m", "compose.docker.relay", str(METRICS_PORT), *relayed]
    named = [Supervised(name, confined([f"silkbus-{name}"], needed)) for name, needed in CAPABILITIES.items()]
    return [*named, Supervised("metrics", confined(relay, ["dac_override"]))]


def prepare() -> None:
    """Let this container set what the kernel keeps for each network namespace, and nothing else of /proc/sys.

    Docker mounts all of it read-only; what is below `net` is that of the namespace of who looks (sysctl(5)).
    """
    for arguments in (["--bind", "/proc/sys/net", "/proc/sys/net"], ["-o", "remount,bind,rw", "/proc/sys/net"]):
        subprocess.run(["/bin/mount", *arguments], check=True, timeout=10)  # noqa: S603 (fixed arguments, no shell)


async def ready() -> None:
    """Wait until all services are. Raises tenacity.RetryError after READY_SECONDS."""

    def ask() -> str:
        return "; ".join(
            f"{name}: {text}" for name, socket in SOCKETS.items() if (text := health.problem(f"unix:{socket}"))
        )

    async def missing() -> str:
        return await asyncio.to_thread(ask)

    await AsyncRetrying(
        retry=retry_if_result(bool),
        stop=stop_after_delay(READY_SECONDS),
        wait=wait_exponential(0.1, max=1),
        before_sleep=before_sleep_log(log, logging.DEBUG),
    )(missing)


async def attached(cell: str, app: str) -> apps.Instance:
    """An instance with its network. Raises what the last of several tries raised."""
    return await AsyncRetrying(
        stop=stop_after_attempt(8),
        wait=wait_exponential(0.5, max=10),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )(asyncio.to_thread, apps.attach, cell, app)


async def demo(cell: str, wanted: Sequence[str]) -> None:
    """Attach an instance of each of these apps once the cell can, and keep them running."""
    await ready()
    async with asyncio.TaskGroup() as group:
        for app in wanted:
            instance = await attached(cell, app)
            log.info("app is attached", extra=about(app=app, address=instance.address))
            group.create_task(Supervised(instance.handle, instance.command()).run())


async def run() -> None:
    """The cell, until SIGTERM or SIGINT."""
    cell = os.environ["SILKBUS_CELL"]
    wanted = [app for app in os.environ.get("DEMO_APPS", "").split(",") if app]
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(service.run()) for service in services()]
        tasks.append(group.create_task(demo(cell, wanted)))

        def stop() -> None:
            for task in tasks:
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)


def main() -> int:
    """The program; its exit code."""
    setup("cell", cell=os.environ.get("SILKBUS_CELL", ""))
    if not os.environ.get("SILKBUS_CELL"):
        log.error("set SILKBUS_CELL to the name of this cell")
        return 2
    try:
        prepare()
    except subprocess.SubprocessError as error:
        log.error("/proc/sys/net cannot be made writable: give this container the capability SYS_ADMIN: %s", error)
        return 1
    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
