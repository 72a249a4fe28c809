"""What this machine's kernel and tools can do, tried out in a network namespace that ends with this process.

Run as `unshare --net -- python -m services.doctor.trial KIND…`; prints a JSON object: what was tried -> null, or why it
failed. The host's own namespace is not touched (the kernel may load modules, as for anybody who uses them).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.ipset import IPSet
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

TIMEOUT = 20.0
SET = "sb-trial"

RULES = {
    "match conntrack": ("filter", "-m conntrack --ctstate ESTABLISHED -j ACCEPT"),
    "match connmark, target CONNMARK": ("mangle", "-m connmark --mark 0x1/0x1 -j CONNMARK --save-mark"),
    "match mark, target MARK": ("mangle", "-m mark --mark 0x1/0xffff -j MARK --set-xmark 0x80000/0x80000"),
    "match set (ipset)": ("filter", f"-m set --match-set {SET} src -j ACCEPT"),
    "target SET --map-set (tags)": ("mangle", f"-j SET --map-set {SET} src --map-mark"),
    "match rpfilter (spoofed sources)": ("raw", "-m rpfilter --invert -j DROP"),
    "match addrtype": ("raw", "-m addrtype --dst-type LOCAL -j ACCEPT"),
    "target CT --notrack": ("raw", "-p udp -m udp --dport 4789 -j CT --notrack"),
    "match comment": ("filter", "-m comment --comment sb:trial -j ACCEPT"),
    "target REJECT with tcp-reset": ("filter", "-p tcp -j REJECT --reject-with tcp-reset"),
    "target NFLOG (traffic logs)": ("filter", "-j NFLOG --nflog-group 1 --nflog-prefix sb"),
    "match limit": ("filter", "-m limit --limit 1/sec -j ACCEPT"),
    "target MASQUERADE (egress)": ("nat", "-j MASQUERADE"),
    "target DNAT (forwarded ports)": ("nat", "-p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:80"),
}
"""What our rules are made of, in a chain of the table that it is used in."""


def vxlan_with_gbp() -> str | None:
    with IPRoute() as ipr:
        ipr.link("add", ifname=SET, kind="vxlan", vxlan_id=1, vxlan_port=4789, vxlan_gbp=True, vxlan_learning=False)
        data = next(iter(ipr.link("dump", ifname=SET))).get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_DATA")
        if data.get_attr("IFLA_VXLAN_GBP") is None:
            return "the kernel makes VXLAN devices, and silently without the group policy extension"
    return None


def link_pairs() -> str | None:
    with IPRoute() as ipr:
        ipr.link("add", ifname="sb-trial-a", kind="veth", peer={"ifname": "sb-trial-b"})
    return None


def ipset() -> str | None:
    with IPSet() as sets:
        sets.create(SET, "hash:ip", skbinfo=True)
    return None


def conntrack() -> str | None:
    with NFCTSocket() as sock:
        list(sock.dump())
    return None


def rule(kind: str, table: str, specification: str) -> str | None:
    chain = "OUTPUT" if table == "nat" and "DNAT" in specification else "POSTROUTING" if table == "nat" else "sb-trial"
    head = "" if chain.isupper() else f":{chain} - [0:0]\n"
    return restore(kind, f"*{table}\n{head}-A {chain} {specification}\nCOMMIT\n")


def restore(kind: str, text: str) -> str | None:
    """What iptables has against these lines."""
    done = subprocess.run(  # noqa: S603 (our own words, no shell)
        [f"iptables-{kind}-restore", "--noflush"],
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode == 0:
        return None
    return " ".join(done.stderr.split())[:300] or f"exit {done.returncode}"


def trials(kinds: Sequence[str]) -> Iterator[tuple[str, Callable[[], str | None]]]:
    yield "VXLAN with group policy (GBP)", vxlan_with_gbp
    yield "links between namespaces (veth)", link_pairs
    yield "ipset with marks (hash:ip skbinfo)", ipset
    yield "conntrack by netlink", conntrack
    for kind in kinds:
        for name, (table, specification) in RULES.items():
            yield f"iptables-{kind}: {name}", partial(rule, kind, table, specification)


def main() -> None:
    # Everything below would otherwise be made in the host's own namespace.
    if Path("/proc/self/ns/net").readlink() == Path(f"/proc/{os.getppid()}/ns/net").readlink():
        sys.exit("this changes its network namespace: run it by `unshare --net`")
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        # The lock is a file, the host's unless said otherwise.
        os.environ["XTABLES_LOCKFILE"] = f"{folder}/lock"
        for name, trial in trials(sys.argv[1:]):
            try:
                results[name] = trial()
            except Exception as error:  # noqa: BLE001 (why it does not work is the answer)
                results[name] = f"{error!r}"
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
