"""The workflow of attaching and removing containers, whatever front door (CNI, Garden) asks.

Attaching, in this order: record `attaching`, link and address (silk worker), rules (enforcer), record `ready`, answer.
So what exists of a container always has a record, and what was answered always has its rules in the kernel. Removing,
in this order: record `removing`, rules and flows and at the same time the link, record. The record keeps the address
from being given again while rules still name it, no enforcer that starts meanwhile takes the container for one that is
there, and whatever a crash leaves is found by its record and taken apart again (services.networker.sweep).

The calls for one handle run one after the other; those for different handles at once.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Set
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

from bus.decode import Fields, Malformed
from bus.failpoints import failpoint
from bus.local import Refused, Service, Unreachable
from bus.log import about
from bus.messages import Container, Handle, Stage
from bus.process import KernelThread
from bus.records import Records
from services.networker import namespaces
from services.networker.errors import Conflict, Failed, NotAttached, Unavailable
from services.networker.record import Attachment, Link
from services.networker.turns import Turns

log = logging.getLogger(__name__)

# The shim waits 60 s: waiting for our turn, a whole attachment and its undoing must fit.
TURN_TIMEOUT = 10.0
UNDO_TIMEOUT = 8.0


class Attachments:
    """The containers of this cell. `leftover` is told of a handle that could not be taken apart and must be."""

    def __init__(
        self,
        records: Records,
        silk: Service,
        enforcer: Service,
        disk: KernelThread,
        *,
        attach_timeout: float,
        admit_timeout: float,
    ) -> None:
        self._records = records
        self._silk = silk
        self._enforcer = enforcer
        self._disk = disk
        self._attach_timeout = attach_timeout
        self._admit_timeout = admit_timeout
        self._turns = Turns(TURN_TIMEOUT)
        self.leftover: Callable[[Handle], None] = lambda _: None

    async def all(self) -> list[Container]:
        return await self._disk.run(self._records.all)

    async def add(self, wanted: Attachment) -> Attachment:
        """Attach a container; `wanted` has no link yet, the answer has. The same call again gives the same answer.

        Raises Unavailable, Failed, Conflict or OSError (the record cannot be written); nothing is left then.
        """
        async with self._turns.of(wanted.handle):
            try:
                existing = await self._disk.run(self._records.get, wanted.handle)
            except Malformed as error:
                raise Failed(f"the container's record is unreadable; remove the container first: {error}") from None
            if existing is not None and not await self._disk.run(is_leftover, existing):
                return _same(Attachment.of(existing), wanted)
            if (problem := await self._disk.run(namespaces.problem, wanted.netns)) is not None:
                raise Conflict(problem)
            if existing is not None:
                await self._take_apart(existing.handle, existing)
            return await self._attach(wanted)

    async def remove(self, handle: Handle, netns: str | None, ifname: str | None) -> None:
        """Take a container apart, as far as it exists; all gone already is no error.

        Without a record the enforcer and silk are asked all the same: the record may have been lost. Raises
        Unavailable or Failed, and then the record is still there.
        """
        async with self._turns.of(handle):
            try:
                record = await self._disk.run(self._records.get, handle)
            except Malformed as error:
                log.warning("removing a container by its handle alone", extra=about(handle=handle, error=str(error)))
                record = None
            attached = None if record is None else _ifname(record)
            if attached is not None and ifname is not None and ifname != attached:
                log.info("no such interface to remove", extra=about(handle=handle, ifname=ifname, attached=attached))
                return
            await self._take_apart(handle, record, netns=netns, ifname=ifname)

    async def discard_leftover(self, handle: Handle) -> bool:
        """Take a container apart if it was left half attached or its namespace is gone; whether it was."""
        async with self._turns.of(handle):
            record = await self._disk.run(self._records.get, handle)
            # While this turn is ours nothing is being attached, so a record saying so is a leftover.
            if record is None or not await self._disk.run(is_leftover, record):
                return False
            await self._take_apart(handle, record)
            return True

    async def keep_only(self, network: str, valid: Set[tuple[str, str]]) -> None:
        """Remove the containers of `network` whose (handle, ifname) is not among `valid`; others are not touched.

        One that cannot be removed does not keep the others; raises the last one's Unavailable or Failed then.
        """
        problem: Exception | None = None
        for record in await self.all():
            ours = _attachment(record)
            # One being attached may be newer than the list.
            if record.stage is Stage.ATTACHING or ours is None or ours.network != network:
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
            record = await self._disk.run(self._records.get, expected.handle)
            if record is None or record.stage is not Stage.READY:
                raise NotAttached(f"container {expected.handle} is not attached")
            found = _same(Attachment.of(record), expected)
            assert found.link is not None  # noqa: S101 (_same saw to it)
            if (problem := await self._disk.run(namespaces.problem, found.netns)) is not None:
                raise NotAttached(problem)
            subnet = await self.ready()
            if found.link.address not in subnet:
                raise NotAttached(f"its address {found.link.address} is not in this cell's subnet {subnet}")
            try:
                await self._disk.run(socket.if_nametoindex, found.link.interface or "")
            except OSError:
                raise NotAttached(f"its link {found.link.interface} does not exist on the cell") from None
            return found

    async def ready(self) -> IPv4Network:
        """Make sure that containers can be attached and give back the cell's subnet. Raises Unavailable or Failed."""
        answer = await self._call(self._silk, "GET", "/", None, self._attach_timeout)
        await self._instance()
        return answer.network("overlay_subnet")

    async def _attach(self, wanted: Attachment) -> Attachment:
        undo: list[Callable[[], Awaitable[None]]] = []
        handle = wanted.handle
        try:
            undo.append(lambda: self._delete(handle))
            await self._put(wanted, Stage.ATTACHING)
            failpoint("networker.after-record")

            undo.append(lambda: self._detach(handle, wanted.netns, wanted.ifname, None, UNDO_TIMEOUT))
            link = await self._link(wanted)
            attachment = replace(wanted, link=link)
            failpoint("networker.after-attach")

            undo.append(lambda: self._forget(handle, UNDO_TIMEOUT))
            undo.append(lambda: self._put(attachment, Stage.ATTACHING))  # what we refuse must not be found ready
            await self._make_ready(attachment)
        except Exception as error:
            log.warning("attaching failed, undoing it", extra=about(handle=handle, error=repr(error)))
            await self._undo(handle, undo)
            raise
        log.info("attached", extra=about(handle=handle, app=wanted.identity.app, address=str(link.address)))
        return attachment

    async def _link(self, wanted: Attachment) -> Link:
        body = {"handle": wanted.handle, "netns": wanted.netns, "ifname": wanted.ifname, **wanted.wishes}
        answer = await self._call(self._silk, "POST", "/attach", body, self._attach_timeout)
        try:
            return Link.decode(answer)
        except Malformed as error:
            raise Failed(str(error)) from None

    async def _make_ready(self, attachment: Attachment) -> None:
        """Rules, record, and again rules if the enforcer started anew meanwhile: it may not have seen the record."""
        try:
            async with asyncio.timeout(self._admit_timeout):
                instance = await self._admit(attachment.record(Stage.ATTACHING))
                failpoint("networker.after-admit")
                await self._put(attachment, Stage.READY)
                failpoint("networker.after-ready")
                while await self._instance() != instance:
                    log.info("the enforcer was restarted, admitting again", extra=about(handle=attachment.handle))
                    instance = await self._admit(attachment.record(Stage.READY))
        except TimeoutError:
            raise Unavailable(f"the enforcer did not admit within {self._admit_timeout:g} s") from None

    async def _undo(self, handle: Handle, steps: list[Callable[[], Awaitable[None]]]) -> None:
        """Undo in reverse, up to the first step that fails: the record must outlive what it tells of."""
        try:
            for step in reversed(steps):
                await step()
        except Exception as error:  # noqa: BLE001 (whatever it is, the sweep goes on with it)
            log.warning("left for the sweep", extra=about(handle=handle, error=repr(error)))
            self.leftover(handle)

    async def _take_apart(
        self, handle: Handle, record: Container | None, *, netns: str | None = None, ifname: str | None = None
    ) -> None:
        if record is not None and record.stage is Stage.READY:
            try:
                await self._disk.run(self._records.put, replace(record, stage=Stage.REMOVING))
            except OSError as error:  # a full disk is no reason to keep a container
                log.warning("removing a container recorded as ready", extra=about(handle=handle, error=str(error)))
        address = None
        if record is not None:
            netns, ifname = netns or record.netns, _ifname(record) or ifname
            address = None if record.address is None else str(record.address)

        async def rules() -> None:
            await self._forget(handle, self._admit_timeout)
            failpoint("networker.remove.after-forget")

        async def link() -> None:
            await self._detach(handle, netns, ifname, address, self._attach_timeout)
            failpoint("networker.remove.after-detach")

        # Both to their end, whatever becomes of the other: nothing of ours may go on when the turn is over.
        for outcome in await asyncio.gather(rules(), link(), return_exceptions=True):
            if outcome is not None:
                raise outcome
        await self._delete(handle)
        log.info("removed", extra=about(handle=handle, recorded=record is not None))

    async def _admit(self, record: Container) -> str:
        answer = await self._call(self._enforcer, "POST", "/admit", {"container": record.encode()}, self._admit_timeout)
        return answer.text("instance")

    async def _instance(self) -> str:
        return (await self._call(self._enforcer, "GET", "/state", None, self._admit_timeout)).text("instance")

    async def _forget(self, handle: Handle, timeout: float) -> None:
        await self._call(self._enforcer, "POST", "/forget", {"handle": handle}, timeout)

    async def _detach(
        self, handle: Handle, netns: str | None, ifname: str | None, address: str | None, timeout: float
    ) -> None:
        body = {"handle": handle, "netns": netns, "ifname": ifname, "address": address}
        await self._call(self._silk, "POST", "/detach", body, timeout)

    async def _put(self, attachment: Attachment, stage: Stage) -> None:
        await self._disk.run(self._records.put, attachment.record(stage))

    async def _delete(self, handle: Handle) -> None:
        await self._disk.run(self._records.delete, handle)

    async def _call(self, service: Service, method: str, target: str, body: Any, timeout: float) -> Fields:
        """Ask a service of this cell; its failures in the terms of this module."""
        try:
            return Fields(await service.call(method, target, body, timeout=timeout), f"{service.name} {target}")
        except Unreachable as error:
            raise Unavailable(f"{error}: see that silkbus-{service.name} runs, then try again") from None
        except Refused as error:
            kind = Unavailable if error.status == 503 else Failed
            raise kind(f"{service.name}: {error}") from None


def is_leftover(record: Container) -> bool:
    """Whether nobody can be using this container: half attached, half removed, or without a namespace. May block."""
    if record.stage is not Stage.READY:
        return True
    try:
        return namespaces.is_gone(record.netns)
    except OSError as error:
        log.warning("namespace cannot be looked at", extra=about(handle=record.handle, error=str(error)))
        return False


def _attachment(record: Container) -> Attachment | None:
    try:
        return Attachment.of(record)
    except Malformed:
        return None


def _ifname(record: Container) -> str | None:
    attachment = _attachment(record)
    return None if attachment is None else attachment.ifname


def _same(found: Attachment, wanted: Attachment) -> Attachment:
    """`found`, if it is what is wanted. Raises Conflict."""
    if (found.netns, found.ifname) != (wanted.netns, wanted.ifname):
        raise Conflict(
            f"container {found.handle} is attached already, as {found.ifname} in {found.netns}: "
            f"remove that before attaching it as {wanted.ifname} in {wanted.netns}"
        )
    if found.link is None:
        raise Conflict(f"container {found.handle} is ready without an address in its record: remove it first")
    return found
