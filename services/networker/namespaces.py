"""Looking at a container's network namespace from outside, by its path. Nothing here enters one."""

from pathlib import Path

_OWN = Path("/proc/self/ns/net")


def is_gone(path: str) -> bool:
    """Whether no namespace is at `path` any more: no file, or a file that nothing is mounted on.

    A path that cannot be looked at (no permission, say) raises OSError: it may still be there.
    """
    try:
        found = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    # Every namespace file is on the one nsfs; what an unmounted bind mount leaves behind is not.
    return found.st_dev != _OWN.stat().st_dev


def problem(path: str) -> str | None:
    """Why a container at `path` cannot be attached, or None. The cell's own namespace must never get a link."""
    try:
        if is_gone(path):
            return f"there is no network namespace at {path}"
        found, own = Path(path).stat(), _OWN.stat()
    except (OSError, ValueError) as error:
        return f"the network namespace {path} cannot be looked at: {error}"
    if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
        return f"{path} is the network namespace of the cell itself, not of a container"
    return None
