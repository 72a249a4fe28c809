"""Holding a network namespace by a bind mount, as Garden's external networker does (contract/cell.md 1.4.2).

The networker makes the mounts itself, in its own mount namespace, since that is where the plugins it runs look for
them. The calls block.
"""

import ctypes
import errno
import os
from pathlib import Path

from services.networker import namespaces

_MS_BIND, _MNT_DETACH = 0x1000, 2  # mount(2), umount2(2)
_libc = ctypes.CDLL(None, use_errno=True)


def bind(source: str, target: str) -> None:
    """Mount the namespace at `source` on `target`, unless it is there already. Raises OSError; then nothing is left."""
    place = Path(target)
    if not namespaces.is_gone(target):
        if same(source, target):
            return
        raise FileExistsError(errno.EEXIST, "another network namespace is mounted here", target)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.touch(mode=0o600)
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None) != 0:
        number = ctypes.get_errno()
        place.unlink(missing_ok=True)
        raise OSError(number, os.strerror(number), source)


def unbind(target: str) -> None:
    """Take away all that is mounted on `target`, and the file; what is not there is no error. Raises OSError."""
    while _libc.umount2(os.fsencode(target), _MNT_DETACH) == 0:
        pass
    if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
        raise OSError(number, os.strerror(number), target)
    Path(target).unlink(missing_ok=True)


def same(one: str, other: str) -> bool:
    """Whether both paths are one namespace. Raises OSError."""
    first, second = Path(one).stat(), Path(other).stat()
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
