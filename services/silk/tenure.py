"""How long a lease may be used, and remembering that across a restart of the worker.

The controller counts from the moment it hears a renewal, we from the moment before we sent it, on the clock that goes
on while the machine sleeps; and we stop a margin earlier. So this cell always gives up before the subnet can be
somebody else's, whatever the clocks on the wall say. That clock starts anew with the machine: what another boot
remembered says nothing about the time left, and the lease must be asked for.
"""

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from bus.decode import Fields
from bus.log import about
from bus.messages import Lease

log = logging.getLogger(__name__)

MAX_MARGIN = 60.0
MAX_RENEW_INTERVAL = 30.0


def boot_clock() -> float:
    """Seconds since the machine started, also those it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Tenure:
    """A lease, when its last successful confirmation was sent (boot clock), and for how many seconds that holds."""

    lease: Lease
    confirmed_at: float
    expires_in: float

    @property
    def fence_at(self) -> float:
        """When this cell must have stopped using the lease, on the boot clock."""
        return self.confirmed_at + self.expires_in - min(MAX_MARGIN, self.expires_in / 10)

    @property
    def renew_interval(self) -> float:
        return min(MAX_RENEW_INTERVAL, self.expires_in / 4)

    @property
    def holds(self) -> bool:
        return boot_clock() < self.fence_at


def save(tenure: Tenure, file: Path) -> None:
    """Write it durably. Raises OSError, and then the old one is still there."""
    content = {
        "lease": tenure.lease.encode(),
        "confirmed_at": tenure.confirmed_at,
        "expires_in": tenure.expires_in,
        "boot_id": boot_id(),
    }
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_suffix(".tmp")
    with temporary.open("w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def load(file: Path) -> Tenure | None:
    """What was saved since the machine started, or None. A file that cannot be understood is reported."""
    try:
        fields = Fields(json.loads(file.read_bytes()), str(file))
        if fields.text("boot_id") != boot_id():
            return None
        lease = Lease.decode(fields.mapping("lease"), f"{file}: lease")
        return Tenure(lease, fields.number("confirmed_at"), fields.number("expires_in"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the saved lease is not used", extra=about(file=str(file), error=str(error)))
        return None
