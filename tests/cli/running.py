"""silkbus run beside a test that plays the cells meanwhile."""

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.cli.conftest import APPS, PROGRAM, Result
from tests.policy.server import ADMIN_TOKEN, PolicyServer

WAIT = 60.0


def environment(server: PolicyServer, folder: Path, token: str = ADMIN_TOKEN) -> dict[str, str]:
    """For silkbus with this server and the directory of apps, and nothing else."""
    apps = folder / "apps.json"
    apps.write_text(json.dumps({"apps": APPS}))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SILKBUS_", "XDG_", "CF_"))}
    return {
        **kept,
        "HOME": str(folder),
        "SILKBUS_API": server.url,
        "SILKBUS_TOKEN": token,
        "SILKBUS_DIRECTORY": str(apps),
    }


class Running:
    """A silkbus that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT):
            return (await self.process.stdout.readline()).decode()

    async def value(self) -> Any:
        return json.loads(await self.line())

    async def ended(self) -> Result:
        async with asyncio.timeout(WAIT):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return Result(self.process.returncode, out.decode(), err.decode())


@asynccontextmanager
async def started(variables: dict[str, str], *arguments: str) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *arguments,
        env=variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Where tests run in the background the shell has them ignore it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run(variables: dict[str, str], *arguments: str) -> Result:
    async with started(variables, *arguments) as running:
        return await running.ended()


async def on_terminal(variables: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Exit code, and all that is written to a terminal, by either stream."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        PROGRAM, *arguments, env={**variables, "TERM": "xterm"}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)

    def read() -> bytes:
        parts = []
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                return b"".join(parts)
            if not part:
                return b"".join(parts)
            parts.append(part)

    try:
        async with asyncio.timeout(WAIT):
            output = await asyncio.to_thread(read)
            return await process.wait(), output.decode().replace("\r\n", "\n")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
