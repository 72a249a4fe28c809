"""Attaching a container by whoever is to do it: the silk worker, other CNI plugins, or both one after the other.

In a list of plugins ours stands for the silk worker where it comes first, and for nothing where others have attached
the container before: what it does besides, rules and record, is done for every container anyway. Rules are by the
container's address, so it does not matter to them who attached it.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

from bus.decode import Fields, Malformed
from bus.messages import Handle
from services.networker import cni, plugins
from services.networker.errors import Failed, Unavailable
from services.networker.neighbours import Neighbours
from services.networker.plugins import OURS, Call, PluginList
from services.networker.record import Attachment, Link


class Links:
    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours

    def check(self, wanted: Attachment) -> None:
        """Make sure that it can be tried, so that what is left half done is only what was begun. Raises Failed."""
        if wanted.plugins:
            plugins.check(_list(wanted))

    async def attach(self, wanted: Attachment) -> Attachment:
        """The attachment with its link, and the plugins' result if there were any. Raises Unavailable or Failed."""
        if wanted.plugins:
            try:
                async with asyncio.timeout(self._neighbours.attach_timeout):
                    return await self._run_list(wanted)
            except TimeoutError:
                limit = self._neighbours.attach_timeout
                raise Unavailable(f"the CNI plugins did not attach within {limit:g} s (attach_timeout)") from None
        if wanted.result is not None:
            return replace(wanted, link=link_of(wanted.result))
        return replace(wanted, link=await self._neighbours.attach(wanted))

    async def _run_list(self, wanted: Attachment) -> Attachment:
        of, call = _list(wanted), Call(wanted.handle, wanted.netns, wanted.ifname)
        extra = _extra(wanted)
        link: Link | None = None
        result: Mapping[str, Any] | None = None
        for plugin in of.plugins:
            if plugin["type"] == OURS:
                if result is None:
                    link = await self._neighbours.attach(wanted)
                    result = cni.result_value(replace(wanted, link=link), of.version, {})
                continue
            previous = {} if result is None else {"prevResult": result}
            result = await plugins.add(plugin, of, call, extra | previous)
        assert result is not None  # noqa: S101 (a list has at least one plugin)
        return replace(wanted, result=result, link=link or link_of(result))

    async def detach(
        self,
        handle: Handle,
        attachment: Attachment | None,
        netns: str | None,
        ifname: str | None,
        address: str | None,
        timeout: float,
    ) -> None:
        """Take the link away, as far as it is there. Raises Unavailable or Failed."""
        if attachment is None or not (attachment.plugins or attachment.result is not None):
            await self._neighbours.detach(handle, netns, ifname, address, timeout)
        elif attachment.plugins:
            try:
                async with asyncio.timeout(timeout):
                    await self._run_list_back(attachment, netns or attachment.netns, address, timeout)
            except TimeoutError:
                raise Unavailable(f"the CNI plugins did not detach within {timeout:g} s") from None

    async def _run_list_back(self, attachment: Attachment, netns: str, address: str | None, timeout: float) -> None:
        """All of them, also when one fails: the others' things would stay for ever. Raises the first failure then."""
        of, call = _list(attachment), Call(attachment.handle, netns, attachment.ifname)
        extra = {"prevResult": attachment.result} if attachment.result and of.version != "0.3.1" else {}
        problem: Exception | None = None
        for place, plugin in reversed(list(enumerate(of.plugins))):
            try:
                if plugin["type"] != OURS:
                    await plugins.delete(plugin, of, call, extra)
                elif place == 0:
                    await self._neighbours.detach(attachment.handle, netns, attachment.ifname, address, timeout)
            except (Unavailable, Failed) as error:
                problem = problem or error
        if problem is not None:
            raise problem


def link_of(result: Mapping[str, Any]) -> Link:
    """What a CNI result says of a container's link: its first IPv4 address, and the interface on the cell.

    That is the first interface outside the container: a veth for ptp, for bridge the bridge, which is where its packets
    come from as far as rules can see. Raises Failed.
    """
    try:
        fields = Fields(result, "CNI result")
        interfaces = fields.items("interfaces") if "interfaces" in fields else ()
        each = [Fields(item, "CNI result: interfaces") for item in interfaces]
        for item in fields.items("ips") if "ips" in fields else ():
            ip = Fields(item, "CNI result: ips")
            text = ip.text("address").partition("/")[0]
            if ":" in text:
                continue
            address = Fields({"address": text}, "CNI result: ips").address("address")
            place = ip.integer("interface", low=-(2**31)) if "interface" in ip else None
            if place is not None and not 0 <= place < len(each):
                raise Failed(
                    f"no corresponding interface found, interface index: {place}, number of interfaces: {len(each)}"
                )
            return _link(address, ip, each, None if place is None else each[place])
    except Malformed as error:
        raise Failed(str(error)) from None
    raise Failed("expected an IPv4 address in the CNI result")


def _link(address: IPv4Address, ip: Fields, interfaces: list[Fields], inside: Fields | None) -> Link:
    outside = next((item for item in interfaces if "sandbox" not in item and "name" in item), None)
    return Link(
        address=address,
        interface=None if outside is None else outside.text("name", max_length=15),
        mac=None if outside is None else _text(outside, "mac"),
        peer_mac=None if inside is None else _text(inside, "mac"),
        gateway=ip.address("gateway") if "gateway" in ip else None,
    )


def _text(fields: Fields, name: str) -> str | None:
    return fields.optional_text(name) if name in fields else None


def _list(attachment: Attachment) -> PluginList:
    try:
        return PluginList.decode(attachment.plugins, f"plugins of container {attachment.handle}")
    except Malformed as error:
        raise Failed(str(error)) from None


def _extra(wanted: Attachment) -> dict[str, Any]:
    """What every plugin is told on ADD (contract/cell.md 1.6)."""
    metadata = {"metadata": dict(wanted.identity.metadata)} if wanted.identity.metadata else {}
    mappings = [{"host_port": each.host_port, "container_port": each.container_port} for each in wanted.forwards]
    return metadata | {"runtimeConfig": plugins.runtime_config(mappings, wanted.asked_egress)}
