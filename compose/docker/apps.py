"""The demo's apps in a cell's container: attached as a container runtime does it, listed, and probed.

python -m compose.docker.apps list                    this cell's instances, as JSON
python -m compose.docker.apps connect HANDLE TARGET…  tries tcp:ADDRESS:PORT from inside an instance, as JSON
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compose.docker.secrets import app_guid
from compose.lab import namespaces, probe
from compose.lab.containers import CNI_TIMEOUT, INTERFACE, PORTS

FOLDER = Path("/run/silkbus-apps")
PLUGIN = Path("/opt/cni/bin/silkbus-cni")
NOBODY = "65534"


class AttachError(Exception):
    """An app has no network; the text is the CNI plugin's."""


@dataclass(frozen=True, slots=True)
class Instance:
    handle: str
    app: str
    cell: str
    address: str

    def command(self) -> list[str]:
        """The app itself: in its namespace, as nobody, without capabilities."""
        unprivileged = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
        serve = probe.program("serve", self.handle, *map(str, PORTS))
        return namespaces.inside(self.handle, [*unprivileged, "--bounding-set=-all", *serve])


def attach(cell: str, app: str) -> Instance:
    """A new namespace with the app's network in it; what an earlier start left is removed. Raises AttachError."""
    handle = f"{app}-{cell}"
    FOLDER.mkdir(exist_ok=True)
    _call("DEL", handle, app)
    namespaces.delete(handle)
    namespaces.create(handle)
    result = _call("ADD", handle, app)
    instance = Instance(handle, app, cell, result["ips"][0]["address"].partition("/")[0])
    (FOLDER / f"{handle}.json").write_text(json.dumps(asdict(instance)))
    return instance


def instances() -> list[Instance]:
    """Those of this cell."""
    return [Instance(**json.loads(file.read_text())) for file in sorted(FOLDER.glob("*.json"))]


def _call(command: str, handle: str, app: str) -> dict[str, Any]:
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": handle,
        "CNI_NETNS": str(namespaces.path(handle)),
        "CNI_IFNAME": INTERFACE,
        "CNI_PATH": str(PLUGIN.parent),
    }
    guid = app_guid(app)
    identity = {"policy_group_id": guid, "app_id": guid, "space_id": "demo", "org_id": "demo"}
    config = {"cniVersion": "1.0.0", "name": "silkbus", "type": "silkbus-cni", "metadata": identity}
    done = subprocess.run(  # noqa: S603 (the image's plugin, no shell)
        [str(PLUGIN)],
        input=json.dumps(config),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=CNI_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise AttachError(f"CNI {command} of {handle}: {(done.stdout or done.stderr).strip()}")
    answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    return answer


def main(arguments: Sequence[str]) -> int:
    """The program; its exit code."""
    match arguments:
        case ["list"]:
            print(json.dumps([asdict(instance) for instance in instances()]))
        case ["connect", *targets]:
            seen = {each.handle: probe.connect(each.handle, targets) for each in instances()}
            print(json.dumps({handle: [asdict(outcome) for outcome in outcomes] for handle, outcomes in seen.items()}))
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
