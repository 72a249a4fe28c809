"""Containers of the lab, made as a container runtime makes them: a namespace, CNI ADD, then the app inside.

The CNI plugin is the one that `silkbus install-cni` writes; it is called as the specification says (environment, and
configuration on stdin), by its file, so that its wall time is what a runtime would wait.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compose.lab import namespaces, probe, processes
from compose.lab.services import program
from compose.lab.state import App, LabError, Layout

PORTS = (8080, 9090)
"""What every app listens on, TCP and UDP: one port that policies open, and one to see that only that one opens."""
INTERFACE = "eth0"
CNI_TIMEOUT = 70.0


class CniError(LabError):
    """The CNI plugin answered with an error: its code and text."""

    def __init__(self, handle: str, command: str, code: int | None, message: str) -> None:
        super().__init__(f"CNI {command} of {handle} failed: {message} (code {code})")
        self.code = code


def plugin_folder(layout: Layout, cell: str) -> Path:
    return layout.data / f"{cell}-cni"


def install_plugin(layout: Layout, cell: str) -> None:
    folder = plugin_folder(layout, cell)
    namespaces.run([program("silkbus"), "install-cni", str(folder), "--run-dir", str(layout.cell_run(cell))])


def create(layout: Layout, handle: str, app: str, guid: str, cell: str) -> App:
    """Make a container and wait until its app listens. Raises CniError, CommandFailed or NotReady; undone then."""
    namespace = layout.namespace(handle)
    namespaces.create(namespace)
    try:
        begun = time.monotonic()
        result = call_plugin(layout, "ADD", handle, guid, cell)
        took = time.monotonic() - begun
        address = result["ips"][0]["address"].partition("/")[0]
        log = layout.log(handle)
        log.unlink(missing_ok=True)
        command = probe.program("serve", handle, *map(str, PORTS))
        process = processes.start(handle, command, namespace=namespace, log=log, environment={})
        processes.wait_ready(process, lambda: None if "ready" in log.read_text() else "does not listen yet")
    except BaseException:
        namespaces.end_processes([namespace], grace=0)
        with contextlib.suppress(CniError):  # a runtime asks for DEL after a failed ADD as well
            call_plugin(layout, "DEL", handle, guid, cell)
        namespaces.delete(namespace)
        raise
    return App(handle, app, guid, cell, namespace, address, process, took)


def remove(layout: Layout, container: App) -> None:
    """CNI DEL while the namespace is there, as the specification asks; then the namespace goes."""
    namespaces.end_processes([container.namespace], grace=0.5)
    call_plugin(layout, "DEL", container.handle, container.guid, container.cell)
    namespaces.delete(container.namespace)


def call_plugin(layout: Layout, command: str, handle: str, guid: str, cell: str) -> dict[str, Any]:
    """One call of the plugin: its result. Raises CniError."""
    folder = plugin_folder(layout, cell)
    environment: Mapping[str, str] = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": handle,
        "CNI_NETNS": str(namespaces.path(layout.namespace(handle))),
        "CNI_IFNAME": INTERFACE,
        "CNI_PATH": str(folder),
    }
    identity = {"policy_group_id": guid, "app_id": guid, "space_id": "lab", "org_id": "lab"}
    config = {"cniVersion": "1.0.0", "name": "silkbus", "type": "silkbus-cni", "metadata": identity}
    try:
        done = subprocess.run(  # noqa: S603 (the plugin just installed, no shell)
            [str(folder / "silkbus-cni")],
            input=json.dumps(config),
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=CNI_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CniError(handle, command, None, f"no answer within {CNI_TIMEOUT:g} s") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    except ValueError:
        raise CniError(handle, command, None, f"not JSON: {done.stdout!r} {done.stderr!r}") from None
    if done.returncode != 0:
        message = f"{answer.get('msg', done.stderr.strip())} {answer.get('details', '')}".strip()
        raise CniError(handle, command, answer.get("code"), message)
    return answer
