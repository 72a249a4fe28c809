"""Do large TCP packets get through the overlay?

Some network cards and hypervisors lose or mangle what they are to cut up within a VXLAN tunnel: small requests work,
large answers stall. Nothing on the cell says so but the retransmissions of those connections. So they are looked at in
each container; whoever wants to be sure has a connection opened and filled (`--through HANDLE --to ADDRESS:PORT`).
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.ethtool import Ethtool

from bus.messages import Container
from bus.records import Records
from services.doctor.finding import Finding, fine, unknown, warning, wrong
from services.doctor.overlay import parent, vtep
from services.doctor.settings import DoctorSettings

CHECK = "offload"
FEATURE = "tx-udp_tnl-segmentation"
NOTORIOUS = ("vmxnet3", "bnx2x", "be2net", "qede")
"""Drivers with which this offload has failed in the field (cloudfoundry/cf-networking-release#213, calico#9433)."""
ENOUGH_BYTES = 100_000
MANY_RETRANSMITTED = 0.2
TIMEOUT = 20.0
LARGE = 48 << 10
"""Bytes sent: many packets, which the kernel hands to the card as one; an app that reads nothing takes them, too."""
PATIENCE = 5.0

_COUNTS = re.compile(r"\bbytes_(sent|retrans):(\d+)")

PROBE = """
import fcntl, json, socket, struct, sys, termios, time
address, port, large, patience = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
result = {}
def unacknowledged(s):
    return struct.unpack("i", fcntl.ioctl(s, termios.TIOCOUTQ, b"....") )[0]
try:
    with socket.create_connection((address, port), timeout=patience) as s:
        for name, size in (("small", 64), ("large", large)):
            s.sendall(b"\\n" * size)
            end = time.monotonic() + patience
            while (left := unacknowledged(s)) and time.monotonic() < end:
                time.sleep(0.01)
            result[name] = left
            if left:
                break
except OSError as error:
    result["error"] = str(error)
print(json.dumps(result))
"""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to open a connection: from within the container `through`."""

    through: str
    address: IPv4Address
    port: int


def remedy(device: str) -> str:
    return (
        f"ethtool -K {device} {FEATURE} off, on all cells; if that ends it, have it done at each start of the machine"
        " (a udev rule or a BOSH pre-start); else compare the MTUs of the network in between"
    )


def look(settings: DoctorSettings, target: Target | None) -> Iterator[Finding]:
    device, driver, offloaded = _card(settings)
    if device is None:
        yield unknown(CHECK, "the overlay goes over no device that could be looked at")
        return
    containers = [container for container in Records(settings.containers_dir).all() if container.netns]
    sent = retransmitted = 0
    for container in containers:
        for of_sent, of_retransmitted in _connections(container, settings):
            sent += of_sent
            retransmitted += of_retransmitted
    yield from judge(device, driver, offloaded=offloaded, sent=sent, retransmitted=retransmitted)
    if target is not None:
        found = next((each for each in containers if each.handle == target.through), None)
        if found is None:
            known = ", ".join(each.handle for each in containers[:10]) or "none"
            yield unknown(CHECK, f"no container {target.through!r} on this cell; there are: {known}")
        else:
            yield from judge_sent(device, target, _send(found, target))


def judge(device: str, driver: str, *, offloaded: bool | None, sent: int, retransmitted: int) -> Iterator[Finding]:
    """What is to be said of a card, and of what its containers' TCP connections over the overlay sent so far."""
    state = {None: "of unknown state", True: "on", False: "off"}[offloaded]
    what = f"{FEATURE} of {device} ({driver or 'no driver named'}) is {state}"
    if sent >= ENOUGH_BYTES and retransmitted > MANY_RETRANSMITTED * sent:
        text = (
            f"{retransmitted / sent:.0%} of {sent} bytes that containers sent over the overlay were sent again; {what}"
        )
        yield wrong(CHECK, text, remedy(device))
    elif offloaded and driver in NOTORIOUS:
        text = f"{what}: with this driver it has been seen to lose large TCP packets"
        yield warning(CHECK, text, f"try it with --through HANDLE --to ADDRESS:PORT; if it stalls: {remedy(device)}")
    else:
        again = f"{retransmitted} of {sent} bytes sent again by containers' open connections"
        yield fine(CHECK, f"{what}; {again}")


def judge_sent(device: str, target: Target, result: dict[str, object]) -> Iterator[Finding]:
    """What is to be said of a connection that was to be filled: bytes that were not acknowledged, by size."""
    where = f"{target.through} to {target.address}:{target.port}"
    if "error" in result:
        hint = f"see `silkbus explain` whether a policy allows it, and whether an app listens on port {target.port}"
        yield unknown(CHECK, f"{where}: no connection: {result['error']}", hint)
    elif result.get("small"):
        yield wrong(CHECK, f"{where}: connected, but not even 64 bytes arrive", "look for a firewall on the way")
    elif result.get("large"):
        text = f"{where}: small packets arrive, of {LARGE} bytes at once {result['large']} do not within {PATIENCE:g} s"
        yield wrong(CHECK, text, remedy(device))
    else:
        yield fine(CHECK, f"{where}: {LARGE} bytes at once arrive")


def _card(settings: DoctorSettings) -> tuple[str | None, str, bool | None]:
    """The device below the overlay, its driver, and whether it is to cut up packets within tunnels."""
    with IPRoute() as ipr:
        device = vtep(ipr, settings)
        below = None if device is None else parent(ipr, device)
    if below is None:
        return None, "", None
    name: str = below.get_attr("IFLA_IFNAME")
    try:
        driver = Path(f"/sys/class/net/{name}/device/driver").readlink().name
    except OSError:
        driver = ""
    ethtool = Ethtool()
    try:
        feature = ethtool.get_features(name).features.get(FEATURE)
        return name, driver, None if feature is None else bool(feature.enable)
    except Exception:  # noqa: BLE001 (a device without features, an old kernel: whatever it says, nothing is known)
        return name, driver, None
    finally:
        ethtool.close()


def _connections(container: Container, settings: DoctorSettings) -> Iterator[tuple[int, int]]:
    """Bytes sent, and sent again, by each TCP connection of a container with an address of the overlay."""
    nsenter, ss = shutil.which("nsenter"), shutil.which("ss")
    if nsenter is None or ss is None:
        return
    peers = " or ".join(f"dst {network}" for network in settings.overlay_network)
    command = [nsenter, f"--net={container.netns}", ss, "-tinHO", peers]
    done = subprocess.run(  # noqa: S603 (our own words, no shell)
        command, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    for line in done.stdout.splitlines():
        counts = {name: int(number) for name, number in _COUNTS.findall(line)}
        yield counts.get("sent", 0), counts.get("retrans", 0)


def _send(container: Container, target: Target) -> dict[str, object]:
    nsenter = shutil.which("nsenter")
    if nsenter is None:
        return {"error": "nsenter is not installed (util-linux)"}
    numbers = [str(target.address), str(target.port), str(LARGE), str(PATIENCE)]
    command = [nsenter, f"--net={container.netns}", sys.executable, "-c", PROBE, *numbers]
    done = subprocess.run(  # noqa: S603 (our own words, no shell)
        command, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode != 0:
        return {"error": done.stderr.strip()[-200:]}
    result: dict[str, object] = json.loads(done.stdout)
    return result
