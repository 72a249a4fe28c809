"""silkbus as a process of its own for each call, without the time that Python takes to start.

One program that has imported everything and has no threads forks for each call: the child gets arguments, environment,
output and exit code as if it had been started. What a start itself does (imports, encodings) is for tests that start
the program.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

LIMIT = 60
"""Seconds that a call may take."""


def serve() -> None:
    """Answer each call, a line of JSON on standard input, by a line with the exit code."""
    from cli import main

    for where, _ in main.COMMANDS.values():
        import_module(where.partition(":")[0])
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _call(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _call(call: dict[str, Any]) -> None:
    """Be the program. Does not return."""
    from cli.main import main

    code: Any = 1
    try:
        signal.alarm(LIMIT)
        os.chdir(call["folder"])
        os.environ.clear()
        os.environ.update(call["environment"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, call["out"]), (2, call["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.argv = ["silkbus", *call["arguments"]]
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 (as Python does at the end)
        traceback.print_exc()
    finally:
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


class Warm:
    """That program, and its calls."""

    def __init__(self, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.warm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of one call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        outputs = {"out": str(self._out), "err": str(self._err)}
        call = {"arguments": arguments, "environment": environment, "folder": str(Path.cwd()), **outputs}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        assert code != -signal.SIGALRM, f"silkbus {' '.join(arguments)} took more than {LIMIT} s"
        return code, *(path.read_text(encoding="utf-8") for path in (self._out, self._err))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT)


if __name__ == "__main__":
    serve()
