"""What a record found of a container means: whether it is a leftover, and whether it is what is wanted now."""

import logging

from bus.decode import Malformed
from bus.log import about
from bus.messages import Container, Stage
from services.networker import mounts, namespaces
from services.networker.errors import Conflict
from services.networker.record import Attachment

log = logging.getLogger(__name__)


def is_leftover(record: Container) -> bool:
    """Whether nobody can be using this container: half attached, half removed, or without a namespace. May block."""
    if record.stage is not Stage.READY:
        return True
    try:
        return namespaces.is_gone(record.netns)
    except OSError as error:
        log.warning("namespace cannot be looked at", extra=about(handle=record.handle, error=str(error)))
        return False


def needs_settling(record: Container) -> bool:
    """Whether `settle` has something to do. May block."""
    attachment = attachment_of(record)
    return is_leftover(record) or (attachment is not None and attachment.changing)


def attachment_of(record: Container) -> Attachment | None:
    """The attachment that a record tells of; None for one that this networker did not write."""
    try:
        return Attachment.of(record)
    except Malformed:
        return None


def same(found: Attachment, wanted: Attachment) -> Attachment:
    """`found`, if it is what is wanted. May block. Raises Conflict."""
    if (found.netns, found.ifname) != (wanted.netns, wanted.ifname):
        raise Conflict(
            f"container {found.handle} is attached already, as {found.ifname} in {found.netns}: "
            f"remove that before attaching it as {wanted.ifname} in {wanted.netns}"
        )
    if wanted.source is not None and not mounts.same(wanted.source, found.netns):
        raise Conflict(f"container {found.handle} is attached already, in another namespace: remove that first")
    if found.link is None:
        raise Conflict(f"container {found.handle} is ready without an address in its record: remove it first")
    return found
