"""`silkbus install-cni`: puts the CNI plugin where a container runtime looks for it.

The plugin is one file that imports nothing of ours, so that it starts fast and survives upgrades. What it must know of
its cell is written into it here, so that it need not read settings at each call.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from services.networker.cni import VERSIONS

NAME = "silkbus-cni"
RUN_DIR = Path("/run/silkbus")
TIMEOUT = 60.0
SYSTEM_PYTHON = Path("/usr/bin/python3")


def plugin(python: Path, run_dir: Path, timeout: float) -> str:
    """The plugin's text for the cell whose services have their sockets in `run_dir`; it waits `timeout` seconds."""
    text = (files("services.networker") / "shims" / NAME).read_text()
    constants = {
        "SOCKET": str(run_dir.absolute() / "networker" / "networker.sock"),
        "TIMEOUT": timeout,
        "VERSIONS": list(VERSIONS),
    }
    lines = text.splitlines()
    lines[0] = f"#!{python} -IS"
    for name, value in constants.items():
        (index,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[index] = f"{name} = {value!r}"
    return "\n".join(lines) + "\n"


def conflist() -> str:
    """An example of a network configuration that uses the plugin."""
    value = {"cniVersion": "1.0.0", "name": "silkbus", "plugins": [{"type": NAME}]}
    return json.dumps(value, indent=2) + "\n"


def write(path: Path, text: str, mode: int) -> None:
    """Put a whole file at `path`, or nothing: a runtime may start it at any moment. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; `arguments` without its name. Answers the exit code."""
    parser = argparse.ArgumentParser("silkbus install-cni", description="Install the CNI plugin of this cell.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the runtime's folder of plugins, as /opt/cni/bin")
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="the services' run_dir [%(default)s]")
    parser.add_argument("--conflist", type=Path, metavar="FILE", help="write an example configuration, not print it")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a call may take [%(default)g]")
    default = SYSTEM_PYTHON if SYSTEM_PYTHON.exists() else Path(sys.executable).resolve()
    parser.add_argument("--python", type=Path, default=default, help="the plugin's interpreter [%(default)s]")
    options = parser.parse_args(arguments)
    if options.timeout <= 0:
        parser.error(f"--timeout: must be more than 0 seconds, not {options.timeout:g}")
    try:
        write(options.folder / NAME, plugin(options.python, options.run_dir, options.timeout), 0o755)
        if options.conflist is not None:
            write(options.conflist, conflist(), 0o644)
    except OSError as error:
        print(f"silkbus install-cni: {error.filename or options.folder}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"installed {options.folder / NAME}", file=sys.stderr)
    if options.conflist is None:
        print(conflist(), end="")
    return 0
