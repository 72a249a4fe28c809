"""The state of a cell as its tools and services print it: for support, who cannot look for themselves.

Secrets may be in it, in logs for example; `silkbus diags`, for which it is gathered, takes them out.
"""

import http.client
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.doctor.filters import legacy_tables
from services.doctor.settings import DoctorSettings

TIMEOUT = 60.0
MOST = 8 << 20
"""Characters of one text: of a longer one the end, which is the latest of a log."""

COMMANDS: Mapping[str, Sequence[str]] = {
    "links.txt": ("ip", "-d", "addr"),
    "routes.txt": ("ip", "-4", "route", "show", "table", "all"),
    "neighbours.txt": ("ip", "-4", "neigh"),
    "fdb.txt": ("bridge", "fdb"),
    "iptables-nft.txt": ("iptables-nft-save", "-c"),
    "ip6tables-nft.txt": ("ip6tables-nft-save", "-c"),
    "ipset.txt": ("ipset", "list"),
    "conntrack.txt": ("conntrack", "-L"),
    "sockets.txt": ("ss", "-tnlp"),
    "sysctl.txt": ("sysctl", "-a", "--pattern", r"^net\.(ipv4\.(ip_forward|neigh|conf\.(all|default))|netfilter)"),
    "modules.txt": ("lsmod",),
    "journal.txt": ("journalctl", "-u", "silkbus*", "-n", "20000", "--no-pager"),
}
ANSWERS = {"state.json": "/state", "readyz.txt": "/readyz", "metrics.txt": "/metrics"}


def gather(settings: DoctorSettings) -> dict[str, str]:
    """All of it, by the name of a file; what cannot be had says why. Blocks."""
    found = {name: _output(command) for name, command in COMMANDS.items()}
    legacy = (_output(("iptables-legacy-save", "-c", "-t", table)) for table in legacy_tables())
    found["iptables-legacy.txt"] = "".join(legacy)
    for door in sorted(settings.run_dir.glob("*/*.sock")):
        found |= {f"{door.stem}/{name}": _ask(door, target) for name, target in ANSWERS.items()}
    return found


def _output(command: Sequence[str]) -> str:
    """What a program prints, and its errors after that."""
    program = shutil.which(command[0])
    if program is None:
        return f"{command[0]} is not installed\n"
    try:
        done = subprocess.run(  # noqa: S603 (our own words, no shell)
            [program, *command[1:]], capture_output=True, text=True, timeout=TIMEOUT, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not end within {TIMEOUT:g} s\n"
    return (done.stdout + done.stderr)[-MOST:]


def _ask(door: Path, target: str) -> str:
    """What a service answers on its socket."""
    connection = http.client.HTTPConnection(door.stem, timeout=TIMEOUT)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(door))
            connection.sock = sock
            connection.request("GET", target)
            return connection.getresponse().read().decode(errors="replace")[-MOST:]
    except (OSError, http.client.HTTPException) as error:
        return f"{door} does not answer {target}: {error!r}\n"
