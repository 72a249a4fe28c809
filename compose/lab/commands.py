"""`silkbus lab …`: a lab kept standing, to play with."""

import argparse
import os
import sys
from collections.abc import Sequence

from compose.lab import lifecycle, matrix, namespaces
from compose.lab.lab import Lab
from compose.lab.namespaces import CommandFailed
from compose.lab.processes import NotReady
from compose.lab.state import LabError, Layout, locked
from compose.lab.terminal import Steps, Terminal

DEFAULT_NAME = "lab"


def main(argv: Sequence[str]) -> int:
    """The command; `argv` without its name. Answers the exit status."""
    options = _parser().parse_args(argv)
    try:
        with lifecycle.interruptible():
            status: int = options.command(options, Terminal())
    except (LabError, NotReady, CommandFailed, OSError) as error:
        print(f"silkbus lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("silkbus lab: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("silkbus lab", description=__doc__)
    parser.add_argument("--name", default=DEFAULT_NAME, help="the lab's name [%(default)s]")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    up = verbs.add_parser("up", help="make a lab and leave it standing")
    up.add_argument("--cells", type=int, default=2, metavar="N", help="number of cells [%(default)s]")
    up.add_argument("--iptables", choices=("auto", "nft", "legacy"), default="auto", help="kind [%(default)s]")
    up.set_defaults(command=_up)

    status = verbs.add_parser("status", help="show its services, containers and how to use it")
    status.set_defaults(command=_status)

    run = verbs.add_parser("run", help="start containers of an app")
    run.add_argument("app", metavar="APP")
    run.add_argument("--cell", action="append", metavar="CELL", help="where, as cell-2; again for more [each in turn]")
    run.add_argument("--instances", type=int, metavar="N", help="how many [1, or one for each --cell]")
    run.set_defaults(command=_run)

    remove = verbs.add_parser("remove", help="end a container")
    remove.add_argument("container", metavar="CONTAINER")
    remove.set_defaults(command=_remove)

    execute = verbs.add_parser("exec", help="run a command inside a container, a cell or the centre")
    execute.add_argument("container", metavar="CONTAINER")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD")
    execute.set_defaults(command=_exec)

    show = verbs.add_parser("matrix", help="try who can open a connection to whom")
    show.set_defaults(command=_matrix)

    down = verbs.add_parser("down", help="end the lab and remove all of it")
    down.set_defaults(command=_down)
    return parser


def _up(options: argparse.Namespace, terminal: Terminal) -> int:
    with (
        Steps(terminal) as steps,
        lifecycle.made(options.name, options.cells, kept=True, iptables=options.iptables, report=steps.begin) as made,
    ):
        steps.end()
        _show(made, terminal)
    return 0


def _status(options: argparse.Namespace, terminal: Terminal) -> int:
    with lifecycle.opened(options.name) as opened:
        return 0 if _show(opened, terminal) else 1


def _show(opened: Lab, terminal: Terminal) -> bool:
    """Print the lab's state: whether every service is ready."""
    terminal.title("Services")
    all_ready = True
    for name, process in opened.state.services.items():
        problem = opened.readiness(name)
        all_ready = all_ready and problem is None
        said = terminal.paint("ready", "green") if problem is None else terminal.paint(problem.strip(), "red")
        terminal.line(f"  {name:20} pid {process.pid:<8} {said}")
    terminal.title("Containers")
    for app in opened.state.apps.values():
        alive = "" if app.process.alive() else terminal.paint(" its app has ended", "red")
        terminal.line(f"  {app.handle:20} {app.cell:8} {app.address:15} app {app.app} {app.guid}{alive}")
    if not opened.state.apps:
        terminal.line("  none yet; start one with `silkbus lab run APP`")
    terminal.title("To use it, paste this into your shell, then for example `silkbus add-network-policy APP APP`")
    for name, value in opened.cli_environment().items():
        terminal.line(f"  export {name}={value}")
    terminal.line(f"\nLogs are in {opened.layout.data / 'log'}.")
    return all_ready


def _run(options: argparse.Namespace, terminal: Terminal) -> int:
    with lifecycle.opened(options.name) as opened:
        cells = options.cell or opened.state.cells
        count = options.instances or (len(options.cell) if options.cell else 1)
        if count < 1:
            raise LabError(f"--instances: must be at least 1, not {count}")
        # Those with the fewest containers first, so that instances spread.
        load = {cell: sum(app.cell == cell for app in opened.state.apps.values()) for cell in cells}
        chosen = []
        for _ in range(count):
            cell = min(cells, key=lambda name: load.get(name, 0))
            load[cell] = load.get(cell, 0) + 1
            chosen.append(cell)
        for app in opened.run_app(options.app, chosen):
            terminal.line(f"{app.handle} on {app.cell} at {app.address} (CNI ADD {app.add_seconds * 1000:.0f} ms)")
    return 0


def _remove(options: argparse.Namespace, terminal: Terminal) -> int:
    with lifecycle.opened(options.name) as opened:
        opened.remove(options.container)
    terminal.line(f"{options.container} is removed")
    return 0


def _exec(options: argparse.Namespace, _: Terminal) -> int:
    command = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not command:
        raise LabError("no command: silkbus lab exec CONTAINER -- CMD")
    with lifecycle.opened(options.name) as opened:
        cells = {name: opened.layout.namespace(name) for name in (*opened.state.cells, "centre")}
        namespace = cells.get(options.container) or opened.container(options.container).namespace
    line = namespaces.inside(namespace, command)
    os.execvp(line[0], line)  # noqa: S606 (what the person asked for, in their place)


def _matrix(options: argparse.Namespace, terminal: Terminal) -> int:
    with lifecycle.opened(options.name) as opened:
        apps = list(opened.state.apps.values())
        if len(apps) < 2:
            raise LabError("a matrix needs two containers: start some with `silkbus lab run APP`")
        seen = matrix.take(apps)
    for line in matrix.render(seen, None, terminal):
        terminal.line(line)
    return 0


def _down(options: argparse.Namespace, terminal: Terminal) -> int:
    lifecycle.requirements()
    layout = Layout(options.name)
    with locked(layout), terminal.step(f"removing lab {options.name}"):
        lifecycle.destroy(layout)
    return 0
