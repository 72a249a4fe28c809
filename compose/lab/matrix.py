"""The reachability matrix: who can open a connection to whom, really tried, and beside it what should be so."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from compose.lab.containers import PORTS
from compose.lab.probe import Outcome, connect, target
from compose.lab.state import App
from compose.lab.terminal import Terminal

AT_ONCE = 4
"""Probing containers at the same time: each is a process, and machines have few cores."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Instances of app `source` may open TCP connections to instances of `destination` on ports `start`..`end`."""

    source: str
    destination: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Pair:
    source: App
    destination: App
    port: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """What was seen of every ordered pair of containers and every port."""

    apps: Sequence[App]
    ports: Sequence[int]
    seen: dict[tuple[str, str, int], Outcome]

    def outcome(self, pair: Pair) -> Outcome:
        return self.seen[pair.source.handle, pair.destination.handle, pair.port]

    def pairs(self) -> list[Pair]:
        return [
            Pair(source, destination, port)
            for source in self.apps
            for destination in self.apps
            if source is not destination
            for port in self.ports
        ]

    def wrong(self, allowed: Iterable[Allowed]) -> list[str]:
        """What is not as it should be, a line each. Refused and timed out are both "not reached"."""
        rules = list(allowed)
        return [text for pair in self.pairs() if (text := self.problem(pair, rules)) is not None]

    def problem(self, pair: Pair, rules: Sequence[Allowed]) -> str | None:
        """What is wrong about one pair on one port, or None."""
        outcome, expected = self.outcome(pair), is_allowed(pair, rules)
        where = f"{pair.source.handle} -> {pair.destination.handle} port {pair.port}"
        if outcome.accepted and outcome.by != pair.destination.handle:
            return f"{where}: {outcome.by or 'somebody else'} answered"
        if outcome.accepted and not expected:
            return f"{where}: is open, though no policy allows it"
        if not outcome.accepted and expected:
            return f"{where}: was {outcome.verdict} {outcome.error}".rstrip() + ", though a policy allows it"
        return None


def is_allowed(pair: Pair, rules: Iterable[Allowed]) -> bool:
    return any(
        (rule.source, rule.destination) == (pair.source.app, pair.destination.app)
        and rule.start <= pair.port <= rule.end
        for rule in rules
    )


def take(apps: Sequence[App], ports: Sequence[int] = PORTS) -> Matrix:
    """Try every pair on every port, from inside each container."""

    def row(source: App) -> list[tuple[tuple[str, str, int], Outcome]]:
        keys = [(source.handle, other.handle, port) for other in apps if other is not source for port in ports]
        targets = [target(other.address, port) for other in apps if other is not source for port in ports]
        return list(zip(keys, connect(source.namespace, targets), strict=True))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return Matrix(apps, ports, dict(entry for entries in pool.map(row, apps) for entry in entries))


def render(matrix: Matrix, allowed: Iterable[Allowed] | None, terminal: Terminal) -> list[str]:
    """The matrix as lines: a row for each source, a column for each destination, in it the ports that are open.

    What is not as it should be has a "!" (and stands out in colour); with None for `allowed` nothing is judged.
    """
    rules = None if allowed is None else list(allowed)
    label = max(len(app.handle) for app in matrix.apps)
    widths = [max(len(app.handle), len(app.cell), 5) + 1 for app in matrix.apps]
    indent = " " * (label + 4)
    columns = list(zip(matrix.apps, widths, strict=True))
    lines = [
        (indent + "".join(app.handle.ljust(width) for app, width in columns)).rstrip(),
        indent + terminal.paint("".join(app.cell.ljust(width) for app, width in columns).rstrip(), "dim"),
    ]
    for source in matrix.apps:
        entries = (_entry(matrix, source, destination, rules, terminal, width) for destination, width in columns)
        lines.append(f"  {source.handle.ljust(label)}  {''.join(entries)}".rstrip())
    return lines


def _entry(
    matrix: Matrix, source: App, destination: App, rules: Sequence[Allowed] | None, terminal: Terminal, width: int
) -> str:
    if source is destination:
        return terminal.paint("-".ljust(width), "dim")
    pairs = [Pair(source, destination, port) for port in matrix.ports]
    opened = [str(pair.port) for pair in pairs if matrix.outcome(pair).accepted]
    text = "all" if len(opened) == len(pairs) > 1 else ",".join(opened) or "."
    if rules is not None and any(matrix.problem(pair, rules) for pair in pairs):
        return terminal.paint(f"{text}!", "red") + " " * (width - len(text) - 1)
    return terminal.paint(text.ljust(width), "green" if opened else "dim")
