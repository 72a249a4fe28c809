"""The workflow of attaching and removing containers, whatever front door (CNI, Garden) asks.

Attaching, in this order: record `attaching`, link and address (silk worker or other plugins), rules (enforcer), event,
record `ready`, answer. So what exists of a container always has a record, and what was answered always has its rules
in the kernel. Removing, in this order: record `removing`, rules and flows and at the same time the link, event, record.
The record keeps the address from being given again while rules still name it, no enforcer that starts meanwhile takes
the container for one that is there, and whatever a crash leaves is found by its record and taken apart again
(services.networker.sweep).

The calls for one handle run one after the other; those for different handles at once.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import replace

from bus.decode import Malformed
from bus.failpoints import failpoint
from bus.log import about
from bus.messages import CellName, Container, Handle, PortForward, Stage
from bus.process import KernelThread
from bus.records import Records
from services.networker import inside, mounts, namespaces
from services.networker.errors import Conflict, Failed, NotAttached, Unavailable
from services.networker.found import attachment_of, is_leftover, same
from services.networker.links import Links
from services.networker.neighbours import Neighbours
from services.networker.outbox import Outbox, event_of
from services.networker.ports import PortPool
from services.networker.record import Attachment
from services.networker.turns import Turns

log = logging.getLogger(__name__)

# The shim waits 60 s: waiting for our turn, a whole attachment and its undoing must fit.
TURN_TIMEOUT = 10.0
UNDO_TIMEOUT = 8.0

Change = Callable[[Attachment], Attachment]


def _no_ports(_: Handle) -> tuple[PortForward, ...]:
    return ()


class Attachments:
    """The containers of this cell. `leftover` is told of a handle that could not be taken apart and must be."""

    def __init__(
        self, cell: CellName, records: Records, neighbours: Neighbours, outbox: Outbox, disk: KernelThread
    ) -> None:
        self._cell = cell
        self._records = records
        self._neighbours = neighbours
        self._links = Links(neighbours)
        self._outbox = outbox
        self._disk = disk
        self._turns = Turns(TURN_TIMEOUT)
        self.ports = PortPool()
        self.leftover: Callable[[Handle], None] = lambda _: None

    async def load(self) -> None:
        """Learn from the records which ports are taken. Before anything else."""
        self.ports.load(await self.all())
        await self._outbox.load()

    async def all(self) -> list[Container]:
        return await self._disk.run(self._records.all)

    async def add(
        self, wanted: Attachment, choose: Callable[[Handle], tuple[PortForward, ...]] = _no_ports
    ) -> Attachment:
        """Attach a container; `wanted` has no link yet, the answer has. The same call again gives the same answer.

        `choose` gives it its ports, beside those of `wanted`. Raises Unavailable, Failed, Conflict or OSError (the
        record cannot be written); nothing is left then.
        """
        async with self._turns.of(wanted.handle):
            try:
                existing = await self._disk.run(self._records.get, wanted.handle)
            except Malformed as error:
                raise Failed(f"the container's record is unreadable; remove the container first: {error}") from None
            if existing is not None and not await self._disk.run(is_leftover, existing):
                return await self._disk.run(same, Attachment.of(existing), wanted)
            if (problem := await self._disk.run(namespaces.problem, wanted.source or wanted.netns)) is not None:
                raise Conflict(problem)
            if existing is not None:
                await self._take_apart(existing.handle, existing)
            if wanted.plugins:
                await self._disk.run(self._links.check, wanted)
            try:
                self.ports.take(wanted.handle, wanted.forwards)
                forwards = (*wanted.forwards, *choose(wanted.handle))
                return await self._attach(replace(wanted, forwards=forwards, birth=secrets.token_hex(8)))
            except BaseException:
                await self._keep_ports(wanted.handle)
                raise

    async def remove(
        self, handle: Handle, netns: str | None, ifname: str | None, unrecorded: Attachment | None = None
    ) -> Container | None:
        """Take a container apart, as far as it exists; all gone already is no error. Its record, if there was one.

        Without a record everybody is asked all the same, as `unrecorded` says, else silk: the record may have been
        lost. Raises Unavailable or Failed, and then the record is still there, and the sweep goes on with it.
        """
        async with self._turns.of(handle):
            try:
                record = await self._disk.run(self._records.get, handle)
            except Malformed as error:
                log.warning("removing a container by its handle alone", extra=about(handle=handle, error=str(error)))
                record = None
            attachment = None if record is None else attachment_of(record)
            if attachment is not None and ifname is not None and ifname != attachment.ifname:
                fields = about(handle=handle, ifname=ifname, attached=attachment.ifname)
                log.info("no such interface to remove", extra=fields)
                return None
            try:
                await self._take_apart(handle, record, netns=netns, ifname=ifname, unrecorded=unrecorded)
            except (Unavailable, Failed):
                if record is not None:
                    self.leftover(handle)
                raise
            return record

    async def change(self, handle: Handle, change: Change, kind: str | None = None) -> Attachment:
        """Change what a container may reach, or is reached by, and have the enforcer do so; `kind` of event, if any.

        Recorded first, as being changed: a crash before the enforcer has heard of it is mended by the sweep. Raises
        NotAttached, Unavailable, Failed, Conflict or OSError; then the container is as it was.
        """
        async with self._turns.of(handle):
            record = await self._disk.run(self._readable, handle)
            if record is None or record.stage is not Stage.READY:
                raise NotAttached(f"container {handle} is not attached")
            old = Attachment.of(record)
            changed = change(old)
            try:
                await self._put(replace(changed, changing=True), Stage.READY)
                failpoint("networker.change.after-record")
                await self._admit_for_good(changed)
                if kind is not None:
                    await self._outbox.add(event_of(kind, self._cell, changed))
                await self._put(changed, Stage.READY)
            except Exception as error:
                log.warning("change of a container failed, undoing it", extra=about(handle=handle, error=repr(error)))
                await self._undo(handle, [lambda: self._put(old, Stage.READY), lambda: self._admit_again(old)])
                raise
            finally:
                await self._keep_ports(handle)
            return changed

    async def settle(self, handle: Handle) -> bool:
        """Take a container apart if it was left half attached or its namespace is gone, and go on with a change that
        was begun; whether there was anything to do."""
        async with self._turns.of(handle):
            record = await self._disk.run(self._records.get, handle)
            if record is None:
                return False
            # While this turn is ours nothing is being attached, so a record saying so is a leftover.
            if await self._disk.run(is_leftover, record):
                await self._take_apart(handle, record)
                return True
            attachment = attachment_of(record)
            if attachment is None or not attachment.changing:
                return False
            await self._admit_for_good(attachment)
            if attachment.forwards:
                await self._outbox.add(event_of("ports", self._cell, attachment))
            await self._put(replace(attachment, changing=False), Stage.READY)
            return True

    async def keep_only(self, network: str, valid: Set[tuple[str, str]]) -> None:
        """Remove the containers of `network` whose (handle, ifname) is not among `valid`; others are not touched.

        One that cannot be removed does not keep the others; raises the last one's Unavailable or Failed then.
        """
        problem: Exception | None = None
        for record in await self.all():
            ours = attachment_of(record)
            # One being attached may be newer than the list, and a CNI runtime knows nothing of Garden's.
            if record.stage is Stage.ATTACHING or ours is None or ours.network != network or ours.mounted:
                continue
            if (ours.handle, ours.ifname) in valid:
                continue
            try:
                await self.remove(ours.handle, ours.netns, ours.ifname)
            except (Unavailable, Failed) as error:
                log.warning("not removed", extra=about(handle=ours.handle, error=str(error)))
                problem = error
        if problem is not None:
            raise problem

    async def check(self, expected: Attachment) -> Attachment:
        """Make sure that a container is attached as `expected` says and give back its attachment.

        Raises NotAttached, Conflict, or Unavailable if silk or the enforcer cannot vouch for it.
        """
        async with self._turns.of(expected.handle):
            record = await self._disk.run(self._readable, expected.handle)
            if record is None or record.stage is not Stage.READY:
                raise NotAttached(f"container {expected.handle} is not attached")
            found = await self._disk.run(same, Attachment.of(record), expected)
            if (problem := await self._disk.run(namespaces.problem, found.netns)) is not None:
                raise NotAttached(problem)
            if found.result is None and found.link is not None:
                subnet = await self._neighbours.subnet()
                if found.link.address not in subnet:
                    raise NotAttached(f"its address {found.link.address} is not in this cell's subnet {subnet}")
            await self._neighbours.instance()
            if (problem := await self._disk.run(inside.problem, found)) is not None:
                raise NotAttached(problem)
            return found

    async def ready(self, *, with_silk: bool = True) -> None:
        """Make sure that containers can be attached. Raises Unavailable or Failed."""
        if with_silk:
            await self._neighbours.subnet()
        await self._neighbours.instance()

    async def _attach(self, wanted: Attachment) -> Attachment:
        undo: list[Callable[[], Awaitable[None]]] = []
        handle = wanted.handle
        attachment = wanted
        try:
            undo.append(lambda: self._delete(handle))
            await self._put(wanted, Stage.ATTACHING)
            failpoint("networker.after-record")

            if wanted.source is not None:
                undo.append(lambda: self._disk.run(mounts.unbind, wanted.netns))
                await self._disk.run(mounts.bind, wanted.source, wanted.netns)
            undo.append(lambda: self._links.detach(handle, attachment, wanted.netns, wanted.ifname, None, UNDO_TIMEOUT))
            attachment = await self._links.attach(wanted)
            failpoint("networker.after-attach")

            if wanted.redirects:
                undo.append(lambda: inside.remove_redirects(attachment))
                await inside.add_redirects(attachment)
            undo.append(lambda: self._neighbours.forget(handle, UNDO_TIMEOUT))
            undo.append(lambda: self._put(attachment, Stage.ATTACHING))  # what we refuse must not be found ready
            await self._make_ready(attachment, undo)
        except Exception as error:
            log.warning("attaching failed, undoing it", extra=about(handle=handle, error=repr(error)))
            await self._undo(handle, undo[::-1])
            raise
        address = attachment.link and str(attachment.link.address)
        log.info("attached", extra=about(handle=handle, app=wanted.identity.app, address=address))
        return attachment

    async def _make_ready(self, attachment: Attachment, undo: list[Callable[[], Awaitable[None]]]) -> None:
        """Rules, event, record, and again rules if the enforcer started anew meanwhile: it may not have seen it."""
        timeout = self._neighbours.admit_timeout
        try:
            async with asyncio.timeout(timeout):
                instance = await self._neighbours.admit(attachment.record(Stage.ATTACHING))
                failpoint("networker.after-admit")
                # Before the record: a crash in between tells of a container that is then told to be gone.
                await self._outbox.add(event_of("created", self._cell, attachment))
                undo.append(lambda: self._outbox.add(event_of("deleted", self._cell, attachment)))
                await self._put(attachment, Stage.READY)
                failpoint("networker.after-ready")
                await self._admit_again(attachment, instance)
        except TimeoutError:
            raise Unavailable(f"the enforcer did not admit within {timeout:g} s") from None

    async def _admit_again(self, attachment: Attachment, instance: str = "") -> None:
        """Have it admitted by whichever instance of the enforcer is there; `instance` has done so already."""
        while (found := await self._neighbours.instance()) != instance:
            if instance:
                log.info("the enforcer was restarted, admitting again", extra=about(handle=attachment.handle))
            instance = await self._neighbours.admit(attachment.record(Stage.READY))
            if found == instance:
                break

    async def _admit_for_good(self, attachment: Attachment) -> None:
        timeout = self._neighbours.admit_timeout
        try:
            async with asyncio.timeout(timeout):
                await self._admit_again(attachment)
        except TimeoutError:
            raise Unavailable(f"the enforcer did not admit within {timeout:g} s") from None

    async def _undo(self, handle: Handle, steps: Sequence[Callable[[], Awaitable[None]]]) -> None:
        """Undo, up to the first step that fails: the record must outlive what it tells of."""
        try:
            for step in steps:
                await step()
        except Exception as error:  # noqa: BLE001 (whatever it is, the sweep goes on with it)
            log.warning("left for the sweep", extra=about(handle=handle, error=repr(error)))
            self.leftover(handle)

    async def _take_apart(
        self,
        handle: Handle,
        record: Container | None,
        *,
        netns: str | None = None,
        ifname: str | None = None,
        unrecorded: Attachment | None = None,
    ) -> None:
        if record is not None and record.stage is Stage.READY:
            try:
                await self._disk.run(self._records.put, replace(record, stage=Stage.REMOVING))
            except OSError as error:  # a full disk is no reason to keep a container
                log.warning("removing a container recorded as ready", extra=about(handle=handle, error=str(error)))
        attachment = unrecorded if record is None else attachment_of(record)
        netns = netns or (None if unrecorded is None else unrecorded.netns)
        address = None
        if record is not None:
            netns, ifname = record.netns, ifname if attachment is None else attachment.ifname
            address = None if record.address is None else str(record.address)

        async def rules() -> None:
            await self._neighbours.forget(handle, self._neighbours.admit_timeout)
            failpoint("networker.remove.after-forget")

        async def link() -> None:
            if attachment is not None and attachment.redirects:
                await inside.remove_redirects(attachment)
            await self._links.detach(handle, attachment, netns, ifname, address, self._neighbours.attach_timeout)
            failpoint("networker.remove.after-detach")

        # Both to their end, whatever becomes of the other: nothing of ours may go on when the turn is over.
        for outcome in await asyncio.gather(rules(), link(), return_exceptions=True):
            if outcome is not None:
                raise outcome
        if attachment is not None and attachment.mounted:
            await self._disk.run(mounts.unbind, attachment.netns)
        if attachment is not None and attachment.birth:
            await self._outbox.add(event_of("deleted", self._cell, attachment))
        await self._delete(handle)
        self.ports.keep(handle, ())
        log.info("removed", extra=about(handle=handle, recorded=record is not None))

    async def _keep_ports(self, handle: Handle) -> None:
        """Let a container have the ports that its record says: what was reserved for a call that failed is free."""
        try:
            record = await self._disk.run(self._records.get, handle)
        except (Malformed, OSError) as error:
            log.warning("its ports stay reserved", extra=about(handle=handle, error=str(error)))
        else:
            self.ports.keep(handle, () if record is None else record.forwards)

    def _readable(self, handle: Handle) -> Container | None:
        try:
            return self._records.get(handle)
        except Malformed as error:
            raise Failed(str(error)) from None

    async def _put(self, attachment: Attachment, stage: Stage) -> None:
        await self._disk.run(self._records.put, attachment.record(stage))

    async def _delete(self, handle: Handle) -> None:
        await self._disk.run(self._records.delete, handle)
