"""Logs: one JSON object a line, or readable text on a terminal.

Give what a line is about as fields: `log.info("applied", extra=about(revision=7, handle="web-1"))`. The fields that
the whole house uses are `cell`, `handle`, `app`, `revision`; times are UTC, RFC 3339.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LEVELS = ("debug", "info", "warning", "error")


def about(**fields: Any) -> dict[str, Any]:
    """The `extra` of a log call that carries these fields."""
    return {"about": fields}


class _Formatter(logging.Formatter):
    def __init__(self, service: str, fields: dict[str, Any]) -> None:
        super().__init__()
        self.service = service
        self.fields = fields

    def parts(self, record: logging.LogRecord) -> dict[str, Any]:
        parts = {**self.fields, **getattr(record, "about", {})}
        if record.exc_info:
            parts["error"] = repr(record.exc_info[1])
            parts["traceback"] = self.formatException(record.exc_info)
        return parts

    def time(self, record: logging.LogRecord) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.time(record),
            "level": record.levelname.lower(),
            "service": self.service,
            "message": record.getMessage(),
        }
        return json.dumps({**line, **self.parts(record)}, default=str)


class TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        parts = self.parts(record)
        traceback = parts.pop("traceback", "")
        words = [self.time(record)[11:23], record.levelname.lower(), record.getMessage()]
        words += [f"{name}={value}" for name, value in parts.items()]
        return " ".join(words) + (f"\n{traceback}" if traceback else "")


def setup(service: str, level: str = "info", **fields: Any) -> None:
    """Send this process's logs to standard error, each line with the service's name and these fields."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = TextFormatter if sys.stderr.isatty() else JsonFormatter
    handler.setFormatter(formatter(service, fields))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "uvicorn.access", "aiosqlite", "databases", "asyncio", "pyroute2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
