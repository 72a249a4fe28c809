"""Rules that hand packets to the traffic log, by NFLOG, and chains that log before they refuse.

The prefix says what became of the packet and why: `sb:VERDICT:WHY`. Everything that is refused goes through one of two
chains, so that the limit of lines is each container's own: `sb-deny-in` counts by the destination, a container here,
`sb-deny-out` by the source. Flows that are refused are always handed over, at that bounded rate: the denied-flow events
need them whether or not they are written to the log. Without a reader the kernel drops them.

Contract (cell.md 2.4, 6.3): accepted TCP once a connection; accepted UDP and all that is refused at a limited rate.
"""

from enum import StrEnum

from services.enforcer.rules import REJECT, ChainId, Chains, Rule, Rules, rule
from services.enforcer.traffic_settings import TrafficSettings

PREFIX = "sb"
DENY_IN, DENY_OUT = "sb-deny-in", "sb-deny-out"
"""Log, by the destination's or the source's limit, and refuse."""


class Verdict(StrEnum):
    """What became of a logged packet. DRY: it passed, but would be refused if the rule were not on trial."""

    ALLOWED = "allowed"
    DENIED = "denied"
    DRY = "dry"


class Why(StrEnum):
    """Which kind of rule decided."""

    POLICY = "policy"
    GROUP = "group"
    NOTHING = "nothing"
    """No rule lets it through."""
    REVOKED = "revoked"
    """A policy let it in that is there no more."""
    RATE = "rate"
    """Too many new connections (outbound_connections)."""


def allowed(settings: TrafficSettings, why: Why, *, by: str = "dstip") -> Rules:
    """Rules that log new flows that are let through; the next rule is to let them. `by` is whose the limit for UDP is.

    `by`: "srcip" or "dstip", whichever is the container.
    """
    target = _nflog(settings, Verdict.ALLOWED, why)
    limit = _limit(settings.accepted_udp_logs_per_sec, f"sb-ok-{why}", by)
    return (rule("! -p udp", to=target), rule("-p udp", limit, to=target))


def refused(settings: TrafficSettings, why: Why, verdict: Verdict = Verdict.DENIED, *, by: str) -> Rule:
    """A rule that logs what is refused after it, or only said to be (DRY)."""
    return rule(
        _limit(settings.denied_logs_per_sec, f"sb-{why}-{by}", by),
        to=_nflog(settings, verdict, why),
    )


def deny_chains(settings: TrafficSettings) -> Chains:
    """The two chains that log and refuse."""
    return {
        ChainId("filter", name): (refused(settings, Why.NOTHING, by=by), rule(to=REJECT))
        for name, by in ((DENY_IN, "dstip"), (DENY_OUT, "srcip"))
    }


def understand(prefix: str) -> tuple[Verdict, Why] | None:
    """What a prefix says; None for one that is not ours."""
    match prefix.split(":"):
        case [name, verdict, why] if name == PREFIX and verdict in tuple(Verdict) and why in tuple(Why):
            return Verdict(verdict), Why(why)
    return None


def _nflog(settings: TrafficSettings, verdict: Verdict, why: Why) -> str:
    return f"NFLOG --nflog-prefix {PREFIX}:{verdict}:{why} --nflog-group {settings.nflog_group}"


def _limit(per_second: int, name: str, by: str) -> str:
    # The kernel's table of counts keeps the limit that it was made with, so a new limit needs a new table.
    return (
        f"-m hashlimit --hashlimit-upto {per_second}/sec --hashlimit-burst {per_second}"
        f" --hashlimit-mode {by} --hashlimit-name {name}-{per_second}"
    )
