"""What tests that were killed left of network namespaces: removed by the next run.

A test's namespaces have in their name the number of the process that made them; so those of runs that go on are spared.
"""

import re
import subprocess
from contextlib import suppress
from pathlib import Path

from compose.lab import lifecycle, namespaces

_OURS = re.compile(r"(?:sbe|sbs|sbl|doc|diags)-?(\d+)(?:-.*)?")
_KNOWN = Path("/run/netns")


def remove() -> None:
    """Remove them, and labs that no command holds. As root."""
    lifecycle.sweep()
    with suppress(FileNotFoundError):
        for path in _KNOWN.iterdir():
            made = _OURS.fullmatch(path.name)
            if made is not None and not Path(f"/proc/{made[1]}").exists():
                namespaces.end_processes([path.name], grace=0)
                # Another run may have been quicker.
                subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False, timeout=30)
