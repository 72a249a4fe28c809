"""What `silkbus.pyz` does: a plugin when cf runs it, which puts a port before the command, else `silkbus` itself."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run a command line, without the program's name; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        sys.stdout.write("This cf CLI plugin is not intended to be run on its own\n\n")
        return 1
    # Imported when it is clear which is needed, since reading modules from a zip file takes time.
    if words[0].isascii() and words[0].isdigit() and len(words) > 1:
        from cli.plugin.called import called

        return called(int(words[0]), words[1], words[2:])
    from cli.main import main as silkbus

    return silkbus(words)
