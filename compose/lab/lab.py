"""A lab: cells as network namespaces on this machine, the real services as processes, one set per cell.

    sb-LAB-underlay   a bridge: the network between the cells; nothing else
    sb-LAB-centre     nats-server, policy server, Silk controller
    sb-LAB-cell-N     silk worker, enforcer, networker
    sb-LAB-HANDLE     a container: one app listening

The host's own namespace holds none of it but the gateway's listening socket, which is why nothing of its
configuration changes. Whatever a killed command leaves is found by the names of the namespaces.
"""

import contextlib
import json
import os
import secrets
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from compose.lab import calls, containers, namespaces, processes, services
from compose.lab.state import App, LabError, Layout, State, app_name

CLI_TIMEOUT = 30.0
SETTLE_TIMEOUT = 20.0

Report = Callable[[str], None]


class Lab:
    """A lab whose lock this process holds: see compose.lab.lifecycle."""

    def __init__(self, layout: Layout, state: State) -> None:
        self.layout = layout
        self.state = state

    # Coming up and going down

    def build(self, report: Report = lambda _: None) -> None:
        """Make the namespaces and start every service. Raises LabError, NotReady or CommandFailed."""
        report("network namespaces and the bridge between them")
        for folder in (self.layout.run, self.layout.data, self.layout.data / "log"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state.save(self.layout)
        self._write_files()
        self._network()
        report("the centre: NATS, Silk controller, policy server")
        for name in services.CENTRE:
            self.start(name)
        for part in services.CELL:
            report(f"{part} on {len(self.state.cells)} cells")
            with ThreadPoolExecutor(8) as pool:
                names = [f"{cell}/{part}" for cell in self.state.cells]
                for name in names:
                    self._spawn(name, {})
                list(pool.map(self.wait_ready, names))
        report("the CNI plugin of each cell")
        for cell in self.state.cells:
            containers.install_plugin(self.layout, cell)
        self.state.standing = True
        self.state.save(self.layout)

    def _write_files(self) -> None:
        token = secrets.token_urlsafe(24)
        admin = {"token": token, "user": "admin", "scopes": ["network.admin"]}
        for path, text in (
            (self.layout.tokens, json.dumps({"tokens": [admin]})),
            (self.layout.token, token + "\n"),
            (self.layout.directory, json.dumps({"apps": []})),
        ):
            path.touch(0o600)
            path.write_text(text)

    def _network(self) -> None:
        underlay = self.layout.namespace("underlay")
        namespaces.create(underlay)
        members = {"centre": services.CENTRE_ADDRESS}
        members |= {cell: services.underlay_address(cell) for cell in self.state.cells}
        namespaces.configure(underlay, ["link add bridge type bridge", "link set bridge up"])
        for member, address in members.items():
            namespace = self.layout.namespace(member)
            namespaces.create(namespace)
            namespaces.configure(
                underlay,
                [
                    f"link add {member} type veth peer name eth0 netns {namespace}",
                    f"link set {member} master bridge up",
                ],
            )
            namespaces.configure(namespace, [f"addr add {address}/24 dev eth0", "link set eth0 up"])
            # By default the kernel sends a host only a few ICMP errors a second; then most refusals of a fast probe
            # would look like losses.
            namespaces.run(namespaces.inside(namespace, ["sysctl", "-qw", "net.ipv4.icmp_ratemask=0"]))

    # Services

    def start(self, name: str, **environment: str) -> None:
        """Start a service and wait until it is ready; `environment` is put over its own. Raises NotReady."""
        self._spawn(name, environment)
        self.wait_ready(name)

    def _spawn(self, name: str, environment: Mapping[str, str]) -> None:
        running = self.state.services.get(name)
        if running is not None and running.alive():
            raise LabError(f"{name} is running already (pid {running.pid})")
        with contextlib.ExitStack() as stack:
            variables: dict[str, str] = {}
            descriptors: list[int] = []
            if name == "policy-server":
                socket = stack.enter_context(services.listener(self.state.port))
                self.state.port = socket.getsockname()[1]
                descriptors.append(socket.fileno())
                variables["SILKBUS_LISTEN"] = f"fd:{socket.fileno()}"
            service = services.service(name, self.layout, self.state)
            self.state.services[name] = processes.start(
                name,
                service.command,
                namespace=service.namespace,
                log=self.layout.log(name),
                environment={**service.environment, **variables, **environment},
                descriptors=descriptors,
            )
        self.state.save(self.layout)

    def wait_ready(self, name: str, *, timeout: float = 30.0) -> None:
        service = services.service(name, self.layout, self.state)
        processes.wait_ready(self.state.services[name], service.ready, timeout=timeout)

    def stop(self, name: str) -> None:
        """End a service in an orderly way."""
        self.state.services[name].stop()

    def kill(self, name: str) -> None:
        """End a service with SIGKILL."""
        self.state.services[name].kill()

    def readiness(self, name: str) -> str | None:
        """None for a service that is ready, else what is missing."""
        if not self.state.services[name].alive():
            return f"ended; see {self.layout.log(name)}"
        return services.service(name, self.layout, self.state).ready()

    # Containers

    def run_app(self, app: str, cells: Sequence[str]) -> list[App]:
        """Create one container of `app` on each of these cells (a cell may be named often), one after the other."""
        for cell in cells:
            if cell not in self.state.cells:
                raise LabError(f"no cell {cell!r} in lab {self.layout.name}; there are: {', '.join(self.state.cells)}")
        app_name(app)
        self._list_app(app)
        made = []
        for cell in cells:
            handle = next(name for number in range(10_000) if (name := f"{app}-{number}") not in self.state.apps)
            container = containers.create(self.layout, handle, app, self.guid(app), cell)
            self.state.apps[handle] = container
            self.state.save(self.layout)
            made.append(container)
        return made

    def remove(self, handle: str) -> None:
        """End a container as a runtime does: its processes, CNI DEL, its namespace."""
        containers.remove(self.layout, self.container(handle))
        del self.state.apps[handle]
        self.state.save(self.layout)

    def container(self, handle: str) -> App:
        try:
            return self.state.apps[handle]
        except KeyError:
            there = ", ".join(self.state.apps) or "none yet; start one with `silkbus lab run APP`"
            raise LabError(f"no container {handle!r} in lab {self.layout.name}; there are: {there}") from None

    def guid(self, app: str) -> str:
        """An app's GUID: the same name has the same one in every lab."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{app}.lab.silkbus"))

    def _list_app(self, app: str) -> None:
        listed = json.loads(self.layout.directory.read_text())["apps"]
        if app not in {entry["name"] for entry in listed}:
            listed.append({"guid": self.guid(app), "name": app, "space": "lab", "org": "lab"})
            self.layout.directory.write_text(json.dumps({"apps": listed}, indent=1))

    # Policies

    def gateway(self) -> calls.Gateway:
        return calls.Gateway(self.state.port, self.layout.token.read_text().strip())

    def rule(self, source: str, destination: str, start: int, end: int | None = None) -> calls.Rule:
        """A TCP policy between two apps, by their names."""
        return calls.Rule(self.guid(source), self.guid(destination), start, end or start)

    def cli_environment(self) -> dict[str, str]:
        """What the `silkbus` command must have in its environment to speak to this lab."""
        return {
            "SILKBUS_API": f"http://127.0.0.1:{self.state.port}",
            "SILKBUS_TOKEN_FILE": str(self.layout.token),
            "SILKBUS_DIRECTORY": str(self.layout.directory),
        }

    def cli(self, *arguments: str) -> str:
        """Run the real `silkbus` command against this lab; its output. Raises LabError if it fails."""
        environment = {**os.environ, **self.cli_environment()}
        command = [services.program("silkbus"), *arguments]
        try:
            done = subprocess.run(  # noqa: S603 (our own command, no shell)
                command, env=environment, capture_output=True, text=True, timeout=CLI_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"silkbus {' '.join(arguments)}: did not end within {CLI_TIMEOUT:g} s") from None
        if done.returncode != 0:
            raise LabError(f"silkbus {' '.join(arguments)}: {(done.stderr + done.stdout).strip()}")
        return done.stdout

    def enforcer_state(self, cell: str) -> dict[str, object]:
        """What the enforcer of a cell says of itself. Raises OSError when it does not answer."""
        status, text = calls.get(self.layout.socket(cell, "enforcer"), "/state")
        if status != 200:
            raise ConnectionError(f"{cell}/enforcer: GET /state: {status}: {text.strip()}")
        answer: dict[str, object] = json.loads(text)
        return answer

    def settle(self, revision: int) -> None:
        """Wait until every cell's kernel has this revision of the policies. Raises NotReady."""
        for cell in self.state.cells:

            def missing(cell: str = cell) -> str | None:
                try:
                    seen = self.enforcer_state(cell).get("revision")
                except OSError as error:
                    return str(error)
                behind = not isinstance(seen, int) or seen < revision
                return f"has revision {seen} of the policies, not {revision}" if behind else None

            processes.wait_ready(self.state.services[f"{cell}/enforcer"], missing, timeout=SETTLE_TIMEOUT)
