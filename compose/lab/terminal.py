"""Output for a person: colour and running progress on a terminal, plain lines when piped or with NO_COLOR."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

COLOURS = {"bold": "1", "dim": "2", "green": "32", "red": "1;37;41", "yellow": "33"}


class Terminal:
    """Where the demo and the lab's commands write: standard output."""

    def __init__(self) -> None:
        self.moving = sys.stdout.isatty()
        self.coloured = self.moving and not os.environ.get("NO_COLOR")

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if self.coloured else text

    def line(self, text: str = "") -> None:
        print(text, flush=True)

    def title(self, text: str) -> None:
        self.line()
        self.line(self.paint(text, "bold"))

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Say that something is under way, for how long, and when it is done."""
        begun = time.monotonic()
        done = threading.Event()

        def tick() -> None:
            while not done.wait(0.1):
                print(f"\r  {text} … {time.monotonic() - begun:.1f} s", end="", flush=True)

        ticker = threading.Thread(target=tick, daemon=True)
        if self.moving:
            ticker.start()
        ended = self.paint("failed", "red")
        try:
            yield
            ended = self.paint("done", "green")
        finally:
            done.set()
            if self.moving:
                ticker.join()
                print("\r\x1b[K", end="")
            self.line(f"  {text}: {ended} ({time.monotonic() - begun:.1f} s)")


class Steps:
    """Steps that follow each other: each `begin` ends the one before. Used as a context manager."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._stack = contextlib.ExitStack()

    def begin(self, text: str) -> None:
        self.end()
        self._stack.enter_context(self._terminal.step(text))

    def end(self) -> None:
        """End the step that is under way."""
        self._stack.close()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
