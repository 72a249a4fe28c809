"""The enforcer's settings for what it says of traffic. Defaults are those of the original (contract/cell.md 9)."""

from dataclasses import dataclass
from pathlib import Path

from bus.decode import Malformed
from bus.settings import CellSettings, setting

MAX_PER_SECOND = 10_000
"""The most that xt_hashlimit takes as a burst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSettings(CellSettings):
    log_accepted: bool = setting("log flows that policies let in; can be changed while it runs", False)
    log_denied: bool = setting("log flows that are refused", False)
    log_security_groups: bool = setting(
        "log all flows that security groups let out, not only those of rules that say `log`", False
    )
    denied_logs_per_sec: int = setting("lines a second for what is refused, each container", 1)
    accepted_udp_logs_per_sec: int = setting("lines a second for UDP that is let through, each container", 100)
    traffic_log: Path | None = setting("file of the traffic log; standard output if not set", None)
    nflog_group: int = setting("NFLOG group by which rules hand packets to the enforcer", 7362)
    denied_events_per_sec: int = setting("denied-flow events a second that are sent on the bus; 0: none", 10)
    force_policy_poll_cycle_host: str = setting("address for the original agent's force-… calls", "127.0.0.1")
    force_policy_poll_cycle_port: int = setting("port for them (the original has 8722); 0: none", 0)

    def __post_init__(self) -> None:
        CellSettings.__post_init__(self)
        for name in ("denied_logs_per_sec", "accepted_udp_logs_per_sec"):
            if not 1 <= getattr(self, name) <= MAX_PER_SECOND:
                raise Malformed(f"{name}: must be in 1..{MAX_PER_SECOND}, not {getattr(self, name)}")
        if not 0 <= self.denied_events_per_sec <= MAX_PER_SECOND:
            raise Malformed(f"denied_events_per_sec: must be in 0..{MAX_PER_SECOND}, not {self.denied_events_per_sec}")
        if not 0 <= self.force_policy_poll_cycle_port <= 65535:
            raise Malformed(
                f"force_policy_poll_cycle_port: must be in 0..65535, not {self.force_policy_poll_cycle_port}"
            )
        if not 0 < self.nflog_group <= 0xFFFF:
            raise Malformed(f"nflog_group: must be in 1..65535, not {self.nflog_group}")
