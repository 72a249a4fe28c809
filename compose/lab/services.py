"""The services of a lab: which process runs where, with which settings, and how one sees that it is ready."""

import random
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compose.lab import calls
from compose.lab.namespaces import CommandFailed
from compose.lab.probe import connect, target
from compose.lab.state import LabError, Layout, State

UNDERLAY = "172.31.250"
"""The underlay is this /24, the same in every lab: each has a bridge of its own. Cell N is .N+10, the centre .2."""
CENTRE_ADDRESS = f"{UNDERLAY}.2"
OVERLAY = "10.254.0.0/16"
NATS_PORT = 4222
GATEWAY_PORTS = range(12_000, 32_000)

CENTRE = ("nats", "silk-controller", "policy-server")
CELL = ("silk-worker", "enforcer", "networker")
"""The order of starting: each needs those before it to be ready, or is ready sooner after them."""


def underlay_address(cell: str) -> str:
    return f"{UNDERLAY}.{10 + int(cell.removeprefix('cell-'))}"


def program(name: str) -> str:
    """The path of one of our programs, or of nats-server: beside this Python first. Raises LabError."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        extra = "silkbus[embedded]" if name == "nats-server" else "silkbus"
        raise LabError(f"{name} is not installed: run `{sys.executable} -m pip install '{extra}'`")
    return found


@dataclass(frozen=True, slots=True)
class Service:
    """One process of the lab. `ready` gives None, or what is missing."""

    namespace: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], str | None]


def service(name: str, layout: Layout, state: State) -> Service:
    """The service called `name`, as "policy-server" or "cell-1/enforcer". Raises LabError for one that is not."""
    cell, _, part = name.rpartition("/")
    if cell in state.cells and part in CELL:
        return _of_cell(cell, part, layout, state)
    if not cell and part in CENTRE:
        return _of_centre(part, layout, state)
    raise LabError(f"no service {name!r} in lab {layout.name}; there are: {', '.join(names(state))}")


def names(state: State) -> list[str]:
    return [*CENTRE, *(f"{cell}/{part}" for cell in state.cells for part in CELL)]


def _of_centre(part: str, layout: Layout, state: State) -> Service:
    namespace = layout.namespace("centre")
    database = layout.data / f"{part}.db"
    common = {"SILKBUS_NATS": f"nats://{CENTRE_ADDRESS}:{NATS_PORT}", "SILKBUS_DATABASE": f"sqlite:///{database}"}
    if part == "nats":
        storage = layout.data / "jetstream"  # of the streams of events
        command = [program("nats-server"), "-a", CENTRE_ADDRESS, "-p", str(NATS_PORT), "-js", "-sd", str(storage)]
        return Service(namespace, command, {}, lambda: _nats_problem(namespace))
    if part == "silk-controller":
        run_dir = layout.run / "centre"
        environment = {
            **common,
            "SILKBUS_OVERLAY_NETWORK": OVERLAY,
            "SILKBUS_SUBNET_PREFIX_LENGTH": "24",
            "SILKBUS_RUN_DIR": str(run_dir),
        }
        ready_at = run_dir / part / f"{part}.sock"
        return Service(namespace, [program("silkbus-silk-controller")], environment, lambda: _problem(ready_at))
    # LISTEN is added at the start: a socket of the host's namespace, inherited.
    environment = {**common, "SILKBUS_TOKENS": str(layout.tokens)}
    port = state.port
    return Service(namespace, [program("silkbus-policy-server")], environment, lambda: _problem(port))


def _of_cell(cell: str, part: str, layout: Layout, state: State) -> Service:
    environment = {
        "SILKBUS_CELL": cell,
        "SILKBUS_NATS": f"nats://{CENTRE_ADDRESS}:{NATS_PORT}",
        "SILKBUS_RUN_DIR": str(layout.cell_run(cell)),
        "SILKBUS_STATE_DIR": str(layout.cell_state(cell)),
        # The lock is a file, not of a namespace: cells would wait for each other, and for the host.
        "XTABLES_LOCKFILE": str(layout.cell_run(cell) / "xtables.lock"),
    }
    if part == "silk-worker":
        environment |= {"SILKBUS_UNDERLAY": underlay_address(cell), "SILKBUS_OVERLAY_NETWORK": OVERLAY}
    if part == "enforcer":
        environment |= {"SILKBUS_IPTABLES": state.iptables, "SILKBUS_OVERLAY_NETWORK": OVERLAY}
    ready_at = layout.socket(cell, "silk" if part == "silk-worker" else part)
    return Service(layout.namespace(cell), [program(f"silkbus-{part}")], environment, lambda: _problem(ready_at))


def _nats_problem(namespace: str) -> str | None:
    """NATS greets who connects, so the probe of the containers serves here as well."""
    try:
        (outcome,) = connect(namespace, [target(CENTRE_ADDRESS, NATS_PORT)], timeout=1)
    except CommandFailed as error:
        return str(error)
    return None if outcome.accepted else f"a connection to it was {outcome.verdict}"


def _problem(where: Path | int) -> str | None:
    """What a service's /readyz says is missing, or None."""
    try:
        status, text = calls.get(where, "/readyz") if isinstance(where, Path) else calls.get_tcp(where, "/readyz")
    except OSError as error:
        return str(error)
    return None if status == 200 else text


def listener(port: int) -> socket.socket:
    """A listening socket on the host's loopback, on this port or (0) any: it keeps its namespace wherever it goes.

    Any is one below those that the kernel gives to outgoing connections, so that a service that was killed gets its own
    again.
    """
    tries = [port] if port else random.SystemRandom().sample(GATEWAY_PORTS, 100)
    for number, each in enumerate(tries, 1):
        try:
            return socket.create_server(("127.0.0.1", each), backlog=1024)
        except OSError as error:
            if number == len(tries):
                raise LabError(f"the gateway's port 127.0.0.1:{each} cannot be had: {error.strerror}") from None
    raise AssertionError("there is a last one")
