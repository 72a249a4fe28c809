"""Does the kernel, and do its tools, have what a cell needs? Tried out in a namespace of its own (trial.py)."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

from services.doctor.filters import kind_in_use
from services.doctor.finding import Finding, fine, unknown, wrong
from services.doctor.settings import DoctorSettings

CHECK = "kernel"
TIMEOUT = 120.0

REMEDIES = {
    "VXLAN": "load the module vxlan, or use a kernel with CONFIG_VXLAN, 4.0 or later",
    "links": "load the module veth, or use a kernel with CONFIG_VETH",
    "ipset": "load the modules ip_set and ip_set_hash_ip, or use a kernel with CONFIG_IP_SET_HASH_IP",
    "conntrack": "load the module nf_conntrack_netlink, or use a kernel with CONFIG_NF_CT_NETLINK",
    "iptables": "load the module xt_… of that match or target, or install the kernel's package of extra modules",
}


def look(settings: DoctorSettings) -> Iterator[Finding]:
    """Every feature that is missing, or one finding that none is."""
    kind = kind_in_use(settings)
    if kind is None:
        yield wrong(CHECK, "iptables is not installed", "install iptables 1.8 or later")
    program = shutil.which("unshare")
    if program is None:
        yield unknown(CHECK, "unshare is not installed, so that nothing can be tried out", "install util-linux")
        return
    command = [program, "--net", "--", sys.executable, "-m", "services.doctor.trial", *([kind] if kind else [])]
    done = subprocess.run(  # noqa: S603 (our own words, no shell)
        command, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode != 0:
        yield unknown(CHECK, f"cannot be tried out: {done.stderr.strip()[-300:]}", "run as root, outside a container")
        return
    results: dict[str, str | None] = json.loads(done.stdout)
    failed = {name: reason for name, reason in results.items() if reason is not None}
    for name, reason in failed.items():
        remedy = next(text for word, text in REMEDIES.items() if name.startswith(word))
        yield wrong(CHECK, f"{name} does not work: {reason}", remedy)
    if not failed:
        yield fine(CHECK, f"all {len(results)} features that a cell needs work (iptables-{kind})")
