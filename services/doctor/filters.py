"""The packet filters as they stand: which kind is in use, whose rules are where, who holds the lock.

Nothing is read that would come into being by being read: a legacy table does.
"""

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bus.records import Records
from services.doctor.finding import Finding, fine, unknown, warning, wrong
from services.doctor.settings import DoctorSettings

TIMEOUT = 60.0
OURS = "sb-"
KINDS = ("nft", "legacy")
LOCK = Path("/run/xtables.lock")
LOCK_LOOKS = 20
LOCK_PAUSE = 0.05
MUCH_HELD = 0.3

_JUMP = re.compile(r" -j (\S+)")


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one kind: how many are ours, how many others', of these in the filter table; FORWARD's targets."""

    ours: int
    others: int
    filtering: int
    forward: Sequence[str]

    @property
    def covered(self) -> bool:
        """Whether a rule of somebody else comes before ours in FORWARD, which decides then."""
        first = next((index for index, jump in enumerate(self.forward) if jump.startswith(OURS)), None)
        return first is not None and first > 0


def kind_in_use(settings: DoctorSettings) -> str | None:
    """nft or legacy: as set, else as the enforcer finds it; None without iptables.

    That is what `iptables` is, unless only the other kind's filter table holds others' rules.
    """
    if settings.iptables != "auto":
        return settings.iptables
    host = _host_kind()
    if host is None:
        return None
    other = next(kind for kind in KINDS if kind != host)
    return other if _filters(read(other)) and not _filters(read(host)) else host


def _filters(rules: Rules | None) -> bool:
    return rules is not None and rules.filtering > 0


def _host_kind() -> str | None:
    try:
        done = subprocess.run(
            ["iptables", "-V"],  # noqa: S607 (the host's own choice is the question)
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        return None
    return "nft" if "nf_tables" in done.stdout else "legacy"


def read(kind: str) -> Rules | None:
    """The rules of this kind; None without its program."""
    program = shutil.which(f"iptables-{kind}-save")
    if program is None:
        return None
    arguments: list[list[str]] = [[]]
    if kind == "legacy":
        arguments = [["-t", table] for table in legacy_tables()]
    text = ""
    for extra in arguments:
        done = subprocess.run(  # noqa: S603 (our own words, no shell)
            [program, *extra], capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
        text += done.stdout
    return parse(text)


def legacy_tables() -> list[str]:
    """The legacy tables that there are."""
    try:
        return Path("/proc/thread-self/net/ip_tables_names").read_text().split()
    except OSError:
        return []


def parse(saved: str) -> Rules:
    """What iptables-save printed."""
    ours = others = filtering = 0
    table = ""
    forward = []
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        if not line.startswith("-A "):
            continue
        found = _JUMP.search(line)
        jump = found[1] if found else ""
        mine = line[3:].startswith(OURS) or jump.startswith(OURS)
        ours += mine
        others += not mine
        filtering += not mine and table == "filter"
        if line.startswith("-A FORWARD "):
            forward.append(jump)
    return Rules(ours, others, filtering, forward)


def look(settings: DoctorSettings) -> Iterator[Finding]:
    kind = kind_in_use(settings)
    if kind is None:
        yield wrong("iptables", "iptables is not installed", "install iptables 1.8 or later")
        return
    yield from judge(kind, {name: read(name) for name in KINDS}, len(Records(settings.containers_dir).all()))


def judge(kind: str, found: Mapping[str, Rules | None], containers: int) -> Iterator[Finding]:
    """What is to be said of these rules on a cell with so many containers, whose host uses this kind."""
    check = "iptables"
    of = {name: rules for name, rules in found.items() if rules is not None and rules.ours + rules.others}
    with_ours = [name for name, rules in of.items() if rules.ours]
    if len(with_ours) > 1:
        yield wrong(
            check,
            "our rules are in both kinds, nf_tables and legacy, and both decide",
            f"restart silkbus-enforcer: it takes out those of the other kind; see that its setting iptables is {kind}",
        )
    elif with_ours and with_ours != [kind]:
        yield wrong(
            check,
            f"our rules are in iptables-{with_ours[0]}, while this host uses {kind}",
            f"set iptables to {kind} for silkbus-enforcer, or leave it at auto, and restart it",
        )
    if not with_ours:
        text = f"no rules of ours, on a cell with {containers} containers"
        remedy = "start silkbus-enforcer, and see its log"
        yield wrong(check, text, remedy) if containers else warning(check, text, remedy)
    for name, rules in of.items():
        if name != kind and rules.others and len(with_ours) < 2:
            yield warning(
                check,
                f"{rules.others} rules of others are in iptables-{name}, while this host uses {kind}; both decide",
                f"see them with iptables-{name}-save; have their owner use {kind}, or take them out",
            )
        if rules.covered:
            yield wrong(
                check,
                f"in FORWARD of iptables-{name}, rules of others come before ours ({rules.forward[0] or 'no target'})",
                "the enforcer puts its own first again within a second; whoever writes that rule fights with it:"
                " have it append its rules",
            )
    if with_ours == [kind]:
        yield fine(check, f"{of[kind].ours} rules of ours in iptables-{kind}, {of[kind].others} of others")


def look_at_lock(_: DoctorSettings) -> Iterator[Finding]:
    """How often the lock of legacy iptables is held: who looks at /proc/locks takes it from nobody."""
    check = "xtables lock"
    path = Path(os.environ.get("XTABLES_LOCKFILE") or LOCK)
    try:
        inode = path.stat().st_ino
    except FileNotFoundError:
        yield fine(check, f"{path} does not exist: nobody has used it since the start")
        return
    holders: Counter[int] = Counter()
    for _look in range(LOCK_LOOKS):
        holders.update(holding(Path("/proc/locks").read_text(), inode))
        time.sleep(LOCK_PAUSE)
    held = holders.total() / LOCK_LOOKS
    if held < MUCH_HELD:
        yield fine(check, f"{path} was held in {held:.0%} of {LOCK_LOOKS} looks")
        return
    names = ", ".join(f"{_command(pid)} (pid {pid})" for pid, _ in holders.most_common(3))
    yield wrong(
        check,
        f"{path} was held in {held:.0%} of {LOCK_LOOKS} looks, by {names}",
        "whoever holds it keeps legacy iptables from everybody else: have it write less often, or end it",
    )


def holding(locks: str, inode: int) -> list[int]:
    """The processes that hold a lock on this inode, by the text of /proc/locks (proc_locks(5)); not those who wait."""
    found = []
    for line in locks.splitlines():
        words = line.split()
        if len(words) >= 8 and words[1] != "->" and words[5].rpartition(":")[2] == str(inode):
            found.append(int(words[4]))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process that has ended" if pid > 0 else "a process elsewhere"


def look_at_conntrack(_: DoctorSettings) -> Iterator[Finding]:
    """Is there room for more connections?"""
    check = "conntrack"
    folder = Path("/proc/sys/net/netfilter")
    try:
        count = int((folder / "nf_conntrack_count").read_text())
        most = int((folder / "nf_conntrack_max").read_text())
    except FileNotFoundError:
        yield unknown(check, "the kernel tracks no connections yet", "it does once silkbus-enforcer has run")
        return
    if count > 0.8 * most:
        yield wrong(
            check,
            f"{count} of at most {most} connections: beyond, new ones are dropped",
            f"sysctl -w net.netfilter.nf_conntrack_max={4 * most}",
        )
    else:
        yield fine(check, f"{count} of at most {most} connections")
