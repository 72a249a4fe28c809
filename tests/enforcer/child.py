"""An enforcer as a process, to be killed: `python -m tests.enforcer.child NAMESPACE KIND HANDLE=ADDRESS=APP…`.

Reads one revision of the policies table a line on standard input, as `[[key, value], …]`, and answers each with `done`.
"""

import asyncio
import json
import sys
from ipaddress import IPv4Address
from pathlib import Path

from pyroute2 import netns

from bus.messages import AppId, Container, Handle, Revision, Stage, decode_policy_entry
from bus.process import KernelThread
from bus.tables import Update
from services.enforcer.reconciler import Reconciler
from services.enforcer.settings import EnforcerSettings


async def main(namespace: str, kind: str, *boxes: str) -> None:
    kernel = KernelThread("kernel")
    await kernel.run(netns.setns, namespace)
    reconciler = Reconciler(EnforcerSettings(cell="c", iptables=kind, state_dir=Path("/nowhere")), kernel)
    await reconciler.open()
    containers = []
    for box in boxes:
        handle, address, app = box.split("=")
        containers.append(Container(Handle(handle), "", Stage.READY, AppId(app), IPv4Address(address)))
    reconciler.restore(containers)
    running = asyncio.create_task(reconciler.run())
    revision = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        revision += 1
        changes = {
            tuple(key): None if value is None else decode_policy_entry(tuple(key), value)
            for key, value in json.loads(line)
        }
        reconciler.update_policies(Update(Revision(revision), changes))
        if revision == 1:
            reconciler.begin()
        await reconciler._applied()
        print("done", flush=True)
    running.cancel()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
