"""`silkbus demo`: the main job, shown. Nobody reaches anybody; policies are added, and who may, does, at once; they are
removed, and nobody does.

Everything shown was tried, from inside the containers, on a lab made for it and removed after it. Exit status: 0 if
every cell of every matrix was as expected and the host is as it was, 1 if not, 2 for a wrong call, 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence

from compose.lab import host, latency, lifecycle, matrix
from compose.lab.calls import GatewayError
from compose.lab.containers import PORTS
from compose.lab.lab import Lab
from compose.lab.matrix import Allowed
from compose.lab.namespaces import CommandFailed
from compose.lab.processes import NotReady
from compose.lab.state import App, LabError
from compose.lab.terminal import Steps, Terminal

NAME = "demo"
CELLS = 3
ROUNDS = 5

APPS = {
    "frontend": ["cell-1", "cell-2"],
    "backend": ["cell-1", "cell-3"],
    "cache": ["cell-2", "cell-3"],
    "db": ["cell-1"],
}
"""App -> the cells of its instances, so placed that pairs share a cell and that pairs do not."""

POLICIES = [
    Allowed("frontend", "backend", 8080, 8080),
    Allowed("backend", "db", 9090, 9090),
    Allowed("backend", "cache", 8080, 9090),
]

Errors = (LabError, NotReady, CommandFailed, GatewayError, latency.NotSeen, OSError)


def main(argv: Sequence[str]) -> int:
    """The command; `argv` without its name. Answers the exit status."""
    parser = argparse.ArgumentParser("silkbus demo", description="Shows policies at work on a lab of 3 cells.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="changes of each kind to time [%(default)s]")
    parser.add_argument("--name", default=NAME, help="the name of its lab [%(default)s]")
    parser.add_argument("--iptables", choices=("auto", "nft", "legacy"), default="auto", help="kind [%(default)s]")
    parser.add_argument(
        "--sabotage",
        action="store_true",
        help="add a policy that the demo does not know of, to show that a wrong verdict is noticed",
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds: must be at least 1")
    terminal = Terminal()
    try:
        with lifecycle.interruptible():
            return _run(terminal, options)
    except Errors as error:
        print(f"silkbus demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("silkbus demo: interrupted; the lab is removed", file=sys.stderr)
        return 130


def _run(terminal: Terminal, options: argparse.Namespace) -> int:
    lifecycle.requirements()
    lifecycle.sweep()
    before = host.snapshot()
    terminal.title(f"A lab of {CELLS} cells")
    with (
        Steps(terminal) as steps,
        lifecycle.made(options.name, CELLS, iptables=options.iptables, report=steps.begin) as demo,
    ):
        problems = _show(demo, terminal, steps, options.rounds, sabotage=options.sabotage)
        steps.begin("removing the lab")
    changed = host.differences(before, host.snapshot())
    terminal.title("The end")
    if changed:
        problems += ["the host's network configuration changed: " + text for text in changed]
    else:
        terminal.line("  the host's addresses, routes and rules are as they were")
    if problems:
        for problem in problems:
            terminal.line("  " + terminal.paint("wrong:", "red") + " " + problem)
        return 1
    terminal.line("  " + terminal.paint("every verdict was as expected", "green"))
    return 0


def _show(demo: Lab, terminal: Terminal, steps: Steps, rounds: int, *, sabotage: bool) -> list[str]:
    """The demo itself: what was not as expected, a line each."""
    apps: list[App] = []
    for app, cells in APPS.items():
        steps.begin(f"{app} on {', '.join(cells)}")
        apps += demo.run_app(app, cells)
    steps.end()
    times = sorted(app.add_seconds * 1000 for app in apps)
    terminal.line(f"  CNI ADD took {times[0]:.0f} to {times[-1]:.0f} ms (median {times[len(times) // 2]:.0f} ms)")

    problems = _matrix(demo, terminal, "Before: no policies", apps, [])

    terminal.title("Adding policies")
    for policy in POLICIES:
        _cli(demo, terminal, "add-network-policy", policy)
    if sabotage:
        demo.gateway().add(demo.rule("cache", "db", PORTS[0]))
    problems += _matrix(demo, terminal, "After adding them", apps, POLICIES)

    terminal.title("Removing policies")
    for policy in POLICIES:
        _cli(demo, terminal, "remove-network-policy", policy)
    problems += _matrix(demo, terminal, "After removing them", apps, [])

    terminal.title(f"How long a change takes ({rounds} rounds of adding and removing a policy)")
    source, same, other = demo.container("frontend-0"), demo.container("backend-0"), demo.container("backend-1")
    pairings = [
        latency.Pairing("across cells", source, other, PORTS[0]),
        latency.Pairing("in one cell", source, same, PORTS[0]),
    ]
    with terminal.step("probing"):
        timings = latency.measure(demo.gateway(), pairings, demo.rule("frontend", "backend", PORTS[0]), rounds)
    for line in latency.table(timings):
        terminal.line(line)
    terminal.title("Cleaning up")
    return problems


def _cli(demo: Lab, terminal: Terminal, command: str, policy: Allowed) -> None:
    ports = str(policy.start) if policy.start == policy.end else f"{policy.start}-{policy.end}"
    arguments = [command, policy.source, policy.destination, "--protocol", "tcp", "--port", ports]
    terminal.line("  " + terminal.paint(f"$ silkbus {' '.join(arguments)}", "yellow"))
    for line in demo.cli(*arguments).strip().splitlines():
        terminal.line(f"    {line}")


def _matrix(demo: Lab, terminal: Terminal, title: str, apps: Sequence[App], expected: Sequence[Allowed]) -> list[str]:
    """Take and show the matrix once every cell has the last change: what was not as expected."""
    demo.settle(demo.gateway().revision())
    terminal.title(title)
    terminal.line(
        f"  who (row) opens a TCP connection to whom (column), on which of ports {', '.join(map(str, PORTS))}"
    )
    with terminal.step(f"trying {len(apps) * (len(apps) - 1) * len(PORTS)} connections"):
        seen = matrix.take(apps)
    for line in matrix.render(seen, expected, terminal):
        terminal.line(line)
    wrong = [f"{title}: {text}" for text in seen.wrong(expected)]
    if wrong:
        terminal.line("  " + terminal.paint(f"{len(wrong)} of these are not as expected", "red"))
    else:
        allowed = "; ".join(f"{rule.source} -> {rule.destination}" for rule in expected) or "nobody reaches anybody"
        terminal.line("  " + terminal.paint(f"as expected: {allowed}", "green"))
    return wrong
