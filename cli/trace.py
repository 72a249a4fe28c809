"""What is sent and answered, on standard error if CF_TRACE is `true`, as the cf CLI shows it: without secrets."""

import os
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime

_HIDDEN = "[PRIVATE DATA HIDDEN]"
_SECRET_FIELD = re.compile(
    r'((?:access_token|refresh_token|id_token|client_secret|password|token)"?\s*[=:]\s*"?)[^"&\s,}]+'
)
_SECRET_HEADERS = ("authorization", "proxy-authorization", "cookie", "set-cookie")


def write(title: str, first: str, headers: Iterable[tuple[str, str]], body: bytes | None) -> None:
    """Show a request or a response: its first line, headers and body."""
    if os.environ.get("CF_TRACE") != "true":
        return
    shown = (f"{name}: {_HIDDEN if name.lower() in _SECRET_HEADERS else value}" for name, value in headers)
    text = _SECRET_FIELD.sub(rf"\1{_HIDDEN}", (body or b"").decode(errors="replace"))
    time = datetime.now(UTC).isoformat(timespec="seconds")
    sys.stderr.write("\n".join([f"\n{title}: [{time}]", first, *shown, "", text]) + "\n")
