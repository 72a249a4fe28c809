"""`silkbus install-cni` and `silkbus install-garden`: put a plugin where a container runtime looks for it.

A plugin is one file that imports nothing of ours, so that it starts fast and survives upgrades. What it must know of
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
GARDEN = "silkbus-garden"
SILK = "silkbus-silk"
"""The same plugin, for the silk worker alone: for those who run somebody else's agent."""
RUN_DIR = Path("/run/silkbus")
TIMEOUT = 60.0
SYSTEM_PYTHON = Path("/usr/bin/python3")


def plugin(name: str, python: Path, run_dir: Path, timeout: float) -> str:
    """A plugin's text for the cell whose services have their sockets in `run_dir`; it waits `timeout` seconds."""
    text = (files("services.networker") / "shims" / (NAME if name == SILK else name)).read_text()
    service = "silk" if name == SILK else "networker"
    constants: dict[str, object] = {
        "SOCKET": str(run_dir.absolute() / service / f"{service}.sock"),
        "TIMEOUT": timeout,
    }
    if name != GARDEN:
        constants["VERSIONS"] = list(VERSIONS)
    if name == SILK:
        constants |= {"PROGRAM": SILK, "SERVICE": "silk worker", "DAEMON": "silkbus-silk-worker"}
    lines = text.splitlines()
    lines[0] = f"#!{python} -IS"
    for name, value in constants.items():
        (index,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[index] = f"{name} = {value!r}"
    return "\n".join(lines) + "\n"


def conflist(name: str = NAME) -> str:
    """An example of a network configuration that uses the plugin."""
    value = {"cniVersion": "1.0.0", "name": "silkbus", "plugins": [{"type": name}]}
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
    """The command install-cni; `arguments` without its name. Answers the exit code."""
    parser = _parser("install-cni", "Install the CNI plugin of this cell.", "the runtime's folder, as /opt/cni/bin")
    parser.add_argument("--conflist", type=Path, metavar="FILE", help="write an example configuration, not print it")
    parser.add_argument("--silk", action="store_true", help=f"{SILK}: links only, for a cell with another agent")
    options = _options(parser, arguments)
    name = SILK if options.silk else NAME
    code = _install(name, options, [] if options.conflist is None else [(options.conflist, conflist(name))])
    if code == 0 and options.conflist is None:
        print(conflist(name), end="")
    return code


def garden_main(arguments: Sequence[str] | None = None) -> int:
    """The command install-garden, likewise."""
    parser = _parser("install-garden", "Install Garden's external network plugin of this cell.", "a folder for it")
    return _install(GARDEN, _options(parser, arguments), [])


def _parser(command: str, what: str, folder: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"silkbus {command}", description=what)
    parser.add_argument("folder", type=Path, metavar="DIR", help=folder)
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR, help="the services' run_dir [%(default)s]")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a call may take [%(default)g]")
    default = SYSTEM_PYTHON if SYSTEM_PYTHON.exists() else Path(sys.executable).resolve()
    parser.add_argument("--python", type=Path, default=default, help="the plugin's interpreter [%(default)s]")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.timeout <= 0:
        parser.error(f"--timeout: must be more than 0 seconds, not {options.timeout:g}")
    return options


def _install(name: str, options: argparse.Namespace, more: Sequence[tuple[Path, str]]) -> int:
    try:
        write(options.folder / name, plugin(name, options.python, options.run_dir, options.timeout), 0o755)
        for path, text in more:
            write(path, text, 0o644)
    except OSError as error:
        command = "install-garden" if name == GARDEN else "install-cni"
        print(f"silkbus {command}: {error.filename or options.folder}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"installed {options.folder / name}", file=sys.stderr)
    return 0
