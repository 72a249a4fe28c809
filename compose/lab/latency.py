"""How long a change takes: from the API's answer to the first connection through, and to the first refusal.

The probes run from before the change until after it. A connection counts as through when the handshake is complete,
as refused when the refusal has arrived; one that was lost counts from when it was begun. A time below zero means that
the kernel was faster than the answer: the change is published when it is committed, just before it is answered.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compose.lab.calls import Change, Gateway, Rule
from compose.lab.container_process import TIMED_OUT
from compose.lab.probe import Watch, target
from compose.lab.state import App

TIMEOUT = 10.0
BEFORE = 0.1
AFTER = 0.25


class NotSeen(Exception):
    """A change was not seen by a probe in time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One change as one pair saw it; seconds from the API's answer. `largest_gap` is between two of its probes."""

    pair: str
    opening: bool
    seconds: float
    gap: float


@dataclass(frozen=True, slots=True)
class Pairing:
    """A source, a destination and the port between them, under the name of the way between them."""

    name: str
    source: App
    destination: App
    port: int


def measure(gateway: Gateway, pairings: Sequence[Pairing], rule: Rule, rounds: int) -> list[Timing]:
    """Add and remove `rule`, `rounds` times, while every pairing's source probes. Raises NotSeen.

    All pairings must have one source: its one probe process tries each of their destinations in turn.
    """
    timings: list[Timing] = []
    for _ in range(rounds):
        timings += _one(pairings, lambda: gateway.add(rule), opening=True)
        timings += _one(pairings, lambda: gateway.remove(rule), opening=False)
    return timings


def _one(pairings: Sequence[Pairing], change: Callable[[], Change], *, opening: bool) -> list[Timing]:
    targets = [target(pairing.destination.address, pairing.port) for pairing in pairings]
    (namespace,) = {pairing.source.namespace for pairing in pairings}
    with Watch(namespace, targets) as watch:
        time.sleep(BEFORE)
        made = change()
        firsts = [
            watch.wait_for(number, accepted=opening, after=made.asked, timeout=TIMEOUT)
            for number in range(len(pairings))
        ]
        time.sleep(AFTER)
    timings = []
    for number, (pairing, first) in enumerate(zip(pairings, firsts, strict=True)):
        what = f"{pairing.source.handle} -> {pairing.destination.handle}: {'opening' if opening else 'closing'} it"
        if first is None:
            raise NotSeen(f"{what} was not seen within {TIMEOUT:g} s")
        if watch.seen.of(number)[-1].accepted != opening:
            raise NotSeen(f"{what} did not last")
        at = first.begun if first.verdict == TIMED_OUT else first.ended
        timings.append(Timing(pairing.name, opening, at - made.answered, first.gap))
    return timings


def table(timings: Sequence[Timing]) -> list[str]:
    """The timings as lines: for each pair and kind of change the least, the median and the most, in milliseconds."""
    lines = [f"  {'from the answer of the API to':38} {'pair':12} {'min':>8} {'median':>8} {'max':>8}   ms"]
    groups = dict.fromkeys((timing.opening, timing.pair) for timing in timings)
    for opening, pair in groups:
        values = [item.seconds * 1000 for item in timings if (item.opening, item.pair) == (opening, pair)]
        what = "the first connection through" if opening else "the first refusal"
        numbers = f"{min(values):8.1f} {statistics.median(values):8.1f} {max(values):8.1f}"
        lines.append(f"  {what:38} {pair:12} {numbers}")
    gaps = [timing.gap * 1000 for timing in timings]
    lines.append(
        f"  (probes from a new source port each; the one before that which saw the change was begun "
        f"{statistics.median(gaps):.1f} ms earlier, at most {max(gaps):.1f} ms)"
    )
    return lines
