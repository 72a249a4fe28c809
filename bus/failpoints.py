"""Named places where a crash matters, so that tests can crash there.

`SILKBUS_FAILPOINTS="policy.after-commit=kill;enforcer.before-cut=pause:2"` arms them in one process. Actions:
`kill` (SIGKILL to itself), `kill:N` (on the N-th passing), `pause:SECONDS`, `error` (raises `FailpointError`).
Unarmed, passing one costs a dictionary look-up.
"""

import logging
import os
import signal
import time

POINTS = {
    "policy.before-commit": "a policy change is written but not committed",
    "policy.after-commit": "a policy change is committed, nothing published, the client not answered",
    "policy.after-publish": "a policy change is published, the client not answered",
    "policy.groups.before-commit": "a change of security groups is written but not committed",
    "silk.lease.before-commit": "a change of leases is written but not committed",
    "silk.lease.after-commit": "a lease is committed, nothing published, the cell not answered",
    "silk.attach.after-address": "an address is chosen, no link made",
    "silk.attach.after-link": "the container's link exists, its addresses do not",
    "silk.detach.after-link": "the container's link is gone, its address not yet released",
    "events.before-publish": "the place of the next event in the stream is known, nothing sent",
    "events.after-publish": "an event is acknowledged by the stream, those sent with it perhaps not",
    "enforcer.before-apply": "the desired rules are computed, the kernel has the old ones",
    "enforcer.after-apply": "the kernel has the new rules, revoked flows are not cut, nothing reported",
    "enforcer.after-cut": "revoked flows are cut, nothing reported",
    "networker.after-record": "the record says attaching, nothing else happened",
    "networker.after-attach": "the container has its link, the enforcer does not know it",
    "networker.after-admit": "the container's rules are in the kernel, the record still says attaching",
    "networker.after-ready": "the record says ready, the runtime has no answer",
    "networker.change.after-record": "the record says what a container may reach now, the enforcer does not know it",
    "networker.remove.after-forget": "the container's rules are gone, its link is there",
    "networker.remove.after-detach": "the container's link is gone, its record is there",
}

log = logging.getLogger(__name__)


class FailpointError(Exception):
    """Raised by a failpoint armed with `error`."""


def _parse(text: str) -> dict[str, str]:
    armed = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, action = item.partition("=")
        if name not in POINTS:
            raise ValueError(f"SILKBUS_FAILPOINTS: no failpoint {name!r}; there are: {', '.join(sorted(POINTS))}")
        verb, _, argument = action.partition(":")
        valid = {"error": argument == "", "kill": argument == "" or argument.isdigit(), "pause": _is_number(argument)}
        if not valid.get(verb, False):
            raise ValueError(
                f"SILKBUS_FAILPOINTS: {name}: no action {action!r}; use kill, kill:N, pause:SECONDS or error"
            )
        armed[name] = action
    return armed


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


_armed = _parse(os.environ.get("SILKBUS_FAILPOINTS", ""))
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Pass the failpoint `name`, which must be one of `POINTS`."""
    if name not in POINTS:
        raise KeyError(f"failpoint {name!r} is not listed in bus.failpoints.POINTS")
    action = _armed.get(name)
    if action is None:
        return
    _passed[name] = _passed.get(name, 0) + 1
    verb, _, argument = action.partition(":")
    if verb == "error":
        raise FailpointError(name)
    if verb == "pause":
        log.warning("failpoint %s: pausing %s s", name, argument)
        time.sleep(float(argument))
    elif _passed[name] >= int(argument or 1):
        os.kill(os.getpid(), signal.SIGKILL)
