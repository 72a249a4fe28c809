"""What a command may fail with. `cli.terminal.guarded` turns these into messages and exit codes."""


class Failed(Exception):
    """The command was understood and failed. The text says why, and what to do if that is not plain."""


class WrongUsage(Exception):
    """The command line cannot be understood."""
