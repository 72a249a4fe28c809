"""`silkbus`: finds the command and runs it.

Nothing is imported before it is needed, so that `silkbus --help` is quick: a command's module when it is called, the
list of commands that other packages bring (entry-point group `silkbus.commands`) when it is called or listed.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module

Main = Callable[[list[str]], int]

COMMANDS = {
    "add-network-policy": ("cli.policies:add", "Create policy to allow direct network traffic from one app to another"),
    "remove-network-policy": (
        "cli.policies:remove",
        "Remove network traffic policy of an app",
    ),
    "network-policies": ("cli.policies:show", "List direct network traffic policies"),
}
GROUP = "silkbus.commands"

USAGE = 2
"""Exit code for a command line that cannot be understood; 1 is for what was tried and failed."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line, without the program's name; the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if arguments else USAGE
    name, *rest = arguments
    command = find(name)
    if command is None:
        sys.stderr.write(f"silkbus: no command {name!r}; `silkbus --help` lists them\n")
        return USAGE
    try:
        code = command(rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has read enough; what is still buffered must go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def find(name: str) -> Main | None:
    """The command of this name, or None."""
    if name in COMMANDS:
        module, _, function = COMMANDS[name][0].partition(":")
        command: Main = getattr(import_module(module), function)
        return command
    from importlib.metadata import entry_points

    found = next(iter(entry_points(group=GROUP, name=name)), None)
    return None if found is None else found.load()


def overview() -> str:
    """The text of `silkbus --help`."""
    from importlib.metadata import entry_points

    others = sorted({entry.name for entry in entry_points(group=GROUP)})
    lines = [f"  {name:24}{text}\n" for name, (_, text) in COMMANDS.items()]
    return (
        "Usage: silkbus COMMAND [ARGUMENT…]\n\nNetwork policies:\n"
        + "".join(lines)
        + ("\nOther commands:\n" + "".join(f"  {name}\n" for name in others) if others else "")
        + "\n`silkbus COMMAND --help` explains a command.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
