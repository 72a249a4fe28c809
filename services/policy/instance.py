"""The name of this process on the bus."""

import os
import re
import socket


def instance() -> str:
    """Host and process, as one subject token."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', socket.gethostname())[:40]}-{os.getpid()}"
