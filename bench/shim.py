"""Wall time of one call of the CNI plugin, as a runtime sees it: from starting the process to its end.

    python -m bench.shim [--calls N]        (as root: it makes one network namespace)

Beside the plugin answering VERSION by itself, and STATUS, ADD and DEL through a real networker whose neighbours answer
at once, stands the bare interpreter with the same flags: no plugin in Python can be faster.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence

from services.networker import install
from tests.networker.cell import Cell
from tests.networker.conftest import namespace

CONFIG = json.dumps({"cniVersion": "1.0.0", "name": "bench", "type": "silkbus-cni"}).encode()


def timed(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Milliseconds of one process; it must succeed."""
    start = time.perf_counter()
    subprocess.run(command, input=CONFIG, env=dict(environment), stdout=subprocess.PIPE, check=True)  # noqa: S603
    return (time.perf_counter() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=200, help="calls of each kind [%(default)s]")
    calls = parser.parse_args().calls
    with namespace() as netns, Cell(netns) as cell:
        cell.start(log_level="warning")
        install.write(cell.folder / install.NAME, install.plugin(install.SYSTEM_PYTHON, cell.run_dir, 60), 0o755)
        plugin = [str(cell.folder / install.NAME)]
        bare = [str(install.SYSTEM_PYTHON), "-IS", "-c", "pass"]
        times: dict[str, list[float]] = {}

        def measure(name: str, command: Sequence[str], cni: str, handle: str = "") -> None:
            environment = {"CNI_COMMAND": cni, "CNI_CONTAINERID": handle, "CNI_IFNAME": "eth0", "CNI_PATH": "/"}
            took = timed(command, environment | {"CNI_NETNS": netns})
            times.setdefault(name, []).append(took)

        # Taken in turns, so that what else the machine does falls on all alike.
        for number in range(calls):
            measure("python3 -IS -c pass", bare, "")
            measure("VERSION", plugin, "VERSION")
            measure("STATUS", plugin, "STATUS")
            measure("ADD", plugin, "ADD", f"c{number}")
            measure("DEL", plugin, "DEL", f"c{number}")
    print(f"{'ms a process':22}{'p50':>8}{'p99':>8}")
    for name, values in times.items():
        print(f"{name:22}{statistics.median(values):8.1f}{statistics.quantiles(values, n=100)[98]:8.1f}")


if __name__ == "__main__":
    main()
