"""How long a security group takes from the Cloud Controller to a kernel. As root: `python -m bench.security_groups`.

A real policy server looks each second at a stand-in of the Cloud Controller that has a new group; over a real bus a
replica hears of it, and an enforcer puts it into the tables of a network namespace. From there a container tries, every
few milliseconds, to open a connection to a host beyond the cell. Measured: from the group's being there to the first
connection, and from its being gone to the first refusal.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bus.connection import connect
from bus.tables import SECURITY_GROUPS, Replica
from services.enforcer import following
from tests.bus.tables import cancel
from tests.enforcer.conftest import enforcing, tags
from tests.enforcer.outside import NEAR, Outside, of, reaches
from tests.enforcer.world import cells
from tests.nats_server import NatsServer
from tests.policy.server import PolicyServer
from tests.policy.stubs import LOGIN, CloudControllerStub, Uaa, certificate, rule, security_group

GROUP = "11111111-1111-1111-1111-111111111111"


async def measure(kind: str, rounds: int, folder: Path) -> None:
    with ExitStack() as stack:
        os.environ["XTABLES_LOCKFILE"] = str(folder / "xtables.lock")
        bus = NatsServer(folder)
        bus.start()
        stack.callback(bus.stop)
        authority, files = certificate(folder)
        uaa = Uaa(files)
        controller = CloudControllerStub(uaa, files)
        uaa.start()
        stack.callback(uaa.stop)
        controller.start()
        stack.callback(controller.stop)
        server = PolicyServer(
            folder,
            nats=bus.url,
            uaa_url=uaa.url,
            uaa_client=LOGIN[0],
            uaa_client_secret=LOGIN[1],
            uaa_ca=authority,
            cc_url=controller.url,
            cc_ca_cert=authority,
            cc_internal_url=controller.url,
            cc_internal_ca_cert=authority,
            asg_poll_interval_seconds=1,
        )
        stack.callback(server.close)
        await asyncio.to_thread(server.start)
        (cell,) = stack.enter_context(cells(1))
        app = of(cell.box("web"))
        Outside([cell], 80)
        async with (
            enforcing(cell, kind, known=tags(web=1)) as enforcer,
            connect(bus.url, role="cell", name="cell-1") as connection,
        ):
            replica = Replica(connection, SECURITY_GROUPS)
            replica.listen(enforcer.reconciler.update_security_groups)
            tasks = [asyncio.create_task(replica.run())]
            await replica.usable()
            tasks.append(asyncio.create_task(following.follow(replica, enforcer.reconciler)))
            took: dict[bool, list[float]] = {True: [], False: []}
            for number in range(2 * rounds):
                there = number % 2 == 0
                # Spread over the server's second, which the looks would else fall in step with.
                await asyncio.sleep(1 + number * 0.37 % 1)
                began = time.monotonic()
                if there:
                    controller.groups[GROUP] = security_group(
                        GROUP, rule(destination=str(NEAR), ports="80"), running=True
                    )
                else:
                    del controller.groups[GROUP]
                controller.last_update = f"2026-11-23T10:{number // 60:02}:{number % 60:02}Z"
                while await asyncio.to_thread(reaches, app, NEAR, 80) != there:
                    if time.monotonic() - began > 60:
                        raise SystemExit(f"the group has no effect after a minute\n{server.log}")
                    await asyncio.sleep(0.005)
                took[there].append(time.monotonic() - began)
            for task in tasks:
                await cancel(task)
    for there, what in ((True, "group there to first connection"), (False, "group gone to first refusal")):
        times = sorted(took[there])
        print(f"{kind:6}  {what:32} median {statistics.median(times):.2f} s  max {times[-1]:.2f} s  n {len(times)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="From the Cloud Controller to a cell's kernel.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for kind in ("nft", "legacy"):
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure(kind, options.rounds, Path(folder)))


if __name__ == "__main__":
    main()
