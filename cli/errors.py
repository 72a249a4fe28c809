"""What a command may fail with. `cli.terminal.guarded` turns these into messages and exit codes."""


class Failed(Exception):
    """The command was understood and failed. The text says why, and what to do if that is not plain."""


class NotFound(Failed):
    """No app of this name, where it was looked for."""


class Refused(Failed):
    """The API refused a request; `status` and `reason` are its own words."""

    def __init__(self, text: str, status: int, reason: str) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason


class WrongUsage(Exception):
    """The command line cannot be understood."""
