"""`silkbus`: finds the command and runs it.

Nothing is imported before it is needed, so that `silkbus --help` is quick: a command's module when it is called, the
list of commands that other packages bring (entry-point group `silkbus.commands`) when it is called or listed.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from io import TextIOWrapper

Main = Callable[[list[str]], int]

# Title of the group: name of the command: function that takes the arguments and returns the exit code; what it does.
GROUPS = {
    "Network policies": {
        "add-network-policy": ("cli.policies:add", "Create policy to allow direct network traffic between two apps"),
        "remove-network-policy": ("cli.policies:remove", "Remove network traffic policy of an app"),
        "network-policies": ("cli.policies:show", "List direct network traffic policies"),
    },
    "The same, as in the cf CLI plugin of 2017": {
        "allow-access": ("cli.access:allow", "Allow direct network traffic from one app to another"),
        "remove-access": ("cli.access:remove", "Remove policy and deny direct network traffic from one app to another"),
        "deny-access": ("cli.access:deny", "Deprecated! Use remove-access"),
        "list-access": ("cli.access:show", "List policy for direct network traffic from one app to another"),
    },
    "Policy as code": {
        "apply": ("cli.apply:apply", "Make the policies be what a file says"),
        "diff": ("cli.apply:diff", "Say how the policies differ from a file"),
        "export": ("cli.apply:export", "Print the policies as a file"),
    },
    "What happens": {
        "explain": ("cli.explain:show", "Say why an app may or may not reach another"),
        "status": ("cli.status:show", "Show which cells enforce the policies"),
        "history": ("cli.history:show", "Show who changed which policies when"),
        "events": ("cli.events:show", "Show what happens to policies and leases"),
    },
    "This command": {
        "completion": ("cli.completion:show", "Print a script that completes commands and options"),
        "diags": ("cli.diags:collect", "Put what support needs into one archive, without secrets"),
    },
}
# What the commands do that other packages bring; one that is not here is listed without.
OTHERS = {
    "demo": "Show who reaches whom in a lab, before and after policies",
    "doctor": "Look at this cell, and say what is wrong and what to do",
    "install-cni": "Install the CNI plugin of this cell",
    "install-garden": "Install the external networker for Garden on this cell",
    "install-systemd": "Install systemd units for a cell, or for the centre",
    "lab": "Cells as network namespaces of this machine",
    "nats-config": "Write nats-server's configuration, and certificates",
    "policy": "The policy server's database: migrate, import, restored",
    "silk": "The leases of cells: list, history, release, expire, import",
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
GROUP = "silkbus.commands"

USAGE = 2
"""Exit code for a command line that cannot be understood; 1 is for what was tried and failed."""
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run a command line, without the program's name; the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    prepare_output()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1:
            return main([arguments[1], "--help"])
        sys.stdout.write(overview())
        return 0 if arguments else USAGE
    name, *rest = arguments
    if name in ("--version", "-v", "version"):
        from importlib.metadata import version

        sys.stdout.write(f"silkbus {version('silkbus')}\n")
        return 0
    command = find(name)
    if command is None:
        sys.stderr.write(f"silkbus: no command {name!r}{_resembling(name)}; `silkbus --help` lists them\n")
        return USAGE
    return run(command, rest)


def prepare_output() -> None:
    """What the terminal's encoding has no character for is written as an escape, rather than ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run(command: Main, arguments: list[str]) -> int:
    """Call a command; what ends it from outside becomes an exit code."""
    try:
        code = command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
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
    text = "Usage: silkbus COMMAND [ARGUMENT…]\n"
    for title, commands in GROUPS.items():
        text += f"\n{title}:\n" + "".join(f"  {name:24}{what}\n" for name, (_, what) in commands.items())
    if found := others():
        lines = (f"  {name:24}{OTHERS.get(name, '')}".rstrip() + "\n" for name in found)
        text += "\nFor operators, on a cell or a server:\n" + "".join(lines)
    return text + (
        "\n`silkbus --version` says which this is.\n"
        "\nExamples:\n"
        "  silkbus add-network-policy frontend backend --protocol tcp --port 8080\n"
        "  silkbus network-policies --source frontend\n"
        "\n`silkbus COMMAND --help` explains a command and shows how it is used.\n"
    )


def others() -> list[str]:
    from importlib.metadata import entry_points

    return sorted({entry.name for entry in entry_points(group=GROUP)})


def _resembling(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [*COMMANDS, *others()], n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


if __name__ == "__main__":
    sys.exit(main())
