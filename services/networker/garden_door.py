"""The Garden front door: one call of the external networker becomes one call of the workflow.

What fails is undone, other than in the original: after a failed `up` nothing is left. `net-in`, `net-out` and
`bulk-net-out`, which the original refuses, change the container's record and then the rules.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import Histogram
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.decode import Fields, Malformed
from bus.local import json_body
from bus.log import about
from bus.messages import Handle, PortForward
from bus.process import KernelThread
from bus.records import file_name
from services.networker import garden, inside, plugins, port_state
from services.networker.attachments import Attachments
from services.networker.dns import nameservers
from services.networker.egress import egress_rules
from services.networker.errors import Conflict, Failed, NotAttached, Unavailable
from services.networker.garden import ACTIONS, Command, GardenError
from services.networker.go_json import go_output
from services.networker.identity import identity_of
from services.networker.plugins import PluginList
from services.networker.ports import Mapping as PortMapping
from services.networker.record import Attachment

log = logging.getLogger(__name__)

SECONDS = Histogram("silkbus_networker_garden_seconds", "Duration of Garden's calls", ["action", "outcome"])
MAX_BODY = 25 << 20
"""The shim hands on 4 MiB of standard input at most; as a JSON text it may grow six-fold."""


class GardenDoor:
    """POST /garden, as docs/design.md has it. Whatever goes wrong is a line for standard error, and exit code 1."""

    def __init__(self, attachments: Attachments, disk: KernelThread, dns_servers: tuple[str, ...]) -> None:
        self._attachments = attachments
        self._disk = disk
        self._dns_servers = dns_servers

    def routes(self) -> list[Route]:
        return [Route("/garden", self.post, methods=["POST"])]

    async def post(self, http: HttpRequest) -> Response:
        call = await json_body(http, "POST /garden", limit=MAX_BODY)
        arguments = call.items("arguments")
        if not all(isinstance(argument, str) for argument in arguments):
            raise call.malformed("arguments", "must be texts")
        stderr: list[str] = []
        try:
            command = await self._disk.run(garden.parse, arguments, call.optional_text("cwd") or "/")
        except GardenError as error:
            log.warning("Garden's call refused", extra=about(error=str(error)))
            return JSONResponse({"exit": 1, "stdout": "", "stderr": error.output()})
        label = command.action if command.action in ACTIONS else "unknown"
        with SECONDS.time() as timer:
            try:
                stdout = await self._answer(command, call, stderr)
            except GardenError as error:
                timer.labels(label, "failed")
                fields = about(action=command.action, handle=command.handle, error=str(error))
                log.warning("Garden's call failed", extra=fields)
                return JSONResponse({"exit": 1, "stdout": "", "stderr": "".join(stderr) + error.output()})
            timer.labels(label, "done")
        return JSONResponse({"exit": 0, "stdout": stdout, "stderr": "".join(stderr)})

    async def _answer(self, command: Command, call: Fields, stderr: list[str]) -> str:
        network = await self._network(command, stderr)
        if command.action not in ACTIONS:
            raise command.error(f"unrecognized action: {command.action}")
        doing = ""
        try:
            stdin = call.optional_text("stdin", max_length=MAX_BODY) or ""
            _check_handle(command.handle)
            match command.action:
                case "up":
                    inputs = garden.up_inputs(stdin)
                    doing = "cni up failed: "
                    return await self._up(command, network, inputs, call.integer("pid", low=1), stderr)
                case "down":
                    doing = "cni down: "
                    return await self._down(command, network)
                case "net-in":
                    return await self._net_in(command, garden.net_in_input(stdin))
            return await self._net_out(command, garden.net_out_inputs(stdin, command.action), stderr)
        except (Unavailable, Failed, Conflict, NotAttached, Malformed, OSError) as error:
            raise command.error(_told(error, doing)) from error
        except Exception as error:
            log.exception("unexpected error", extra=about(action=command.action, handle=command.handle))
            raise command.error(f"unexpected error: {error!r}; see the log of silkbus-networker") from error

    async def _network(self, command: Command, stderr: list[str]) -> PluginList:
        """The list of plugins that the operator put into the folder; what is odd about it is said on standard error."""
        config = command.config
        try:
            network, files = await self._disk.run(plugins.load, Path(config.config_dir), config.plugin_dir)
        except Malformed as error:
            raise command.error(f"load cni config: {error}") from None
        if len(files) > 1:
            others = ", ".join(str(file) for file in files if str(file) != network.file)
            stderr.append(
                f"{datetime.now(UTC).isoformat(timespec='seconds')} - Only one CNI config file or conflist (chain) "
                f"will be executed.\n\t\t\tIt is {network.file}.\n\t\t\tNot used: {others}\n"
            )
        return network

    async def _up(
        self, command: Command, network: PluginList, inputs: garden.UpInputs, caller: int, stderr: list[str]
    ) -> str:
        config = command.config
        rules, problems = egress_rules([garden.lower_rule(rule) for rule in inputs.netout_rules], "netout_rules")
        stderr += _skipped(command, problems)
        redirects = inside.redirects(config.redirect_cidr, ingress=config.redirect_ingress, port=config.proxy_port)
        wanted = Attachment(
            command.handle,
            command.netns,
            garden.IFNAME,
            network.name,
            identity_of({**_ours(network), "metadata": inputs.properties}, {}),
            egress=rules,
            plugins={} if network.is_ours_alone else network.encode(),
            source=f"/proc/{inputs.pid}/ns/net" if inputs.pid else f"/proc/{caller}/fd/3",
            redirects=redirects,
            asked_egress=inputs.netout_rules,
        )
        attachment = await self._attachments.add(wanted, await self._chooser(command, inputs.netin))
        if attachment.forwards:
            await self._tell_state(command, attachment.forwards)
        servers = nameservers(attachment.result, _ours(network), self._dns_servers)
        return garden.up_output(attachment, servers, config.search_domains)

    async def _down(self, command: Command, network: PluginList) -> str:
        """All of it; a bind mount that has no record is one that a crash left."""
        unrecorded = Attachment(
            command.handle,
            command.netns,
            garden.IFNAME,
            network.name,
            plugins={} if network.is_ours_alone else network.encode(),
            mounted=True,
        )
        await self._attachments.remove(command.handle, None, garden.IFNAME, unrecorded)
        await self._tell_state(command, ())
        return ""

    async def _net_in(self, command: Command, mapping: PortMapping) -> str:
        choose = await self._chooser(command, (mapping,), same=True)
        chosen: list[PortForward] = []

        def change(attachment: Attachment) -> Attachment:
            chosen.extend(choose(command.handle))
            return replace(attachment, forwards=tuple(dict.fromkeys((*attachment.forwards, *chosen))))

        attachment = await self._attachments.change(command.handle, change, "ports")
        await self._tell_state(command, attachment.forwards)
        return go_output({"host_port": chosen[0].host_port, "container_port": chosen[0].container_port})

    async def _net_out(self, command: Command, asked: tuple[Any, ...], stderr: list[str]) -> str:
        where = "netout_rule" if command.action == "net-out" else "netout_rules"
        rules, problems = egress_rules([garden.lower_rule(rule) for rule in asked], where)
        stderr += _skipped(command, problems)
        await self._attachments.change(
            command.handle,
            lambda attachment: replace(attachment, opened=tuple(dict.fromkeys((*attachment.opened, *rules)))),
        )
        return "{}\n"

    async def _chooser(
        self, command: Command, mappings: tuple[PortMapping, ...], *, same: bool = False
    ) -> Callable[[Handle], tuple[PortForward, ...]]:
        """Chooses ports for a handle, at once: what other handles have in the state file is read before."""
        config = command.config
        if not mappings:
            return lambda _: ()
        entries = await self._disk.run(port_state.acquired, config.state_file)
        known = {str(handle) for handle in self._attachments.ports.handles}
        used = {port for owner, ports in entries.items() if owner not in {*known, command.handle} for port in ports}

        def choose(handle: Handle) -> tuple[PortForward, ...]:
            try:
                return self._attachments.ports.choose(handle, mappings, config.ports, used, same=same)
            except Failed as error:
                raise Failed(f"allocating port: acquire port: {error}") from None

        return choose

    async def _tell_state(self, command: Command, forwards: tuple[PortForward, ...]) -> None:
        ports = [each.host_port for each in forwards]
        try:
            await self._disk.run(port_state.keep, command.config.state_file, command.handle, ports)
        except OSError as error:  # the records have it
            log.warning("state of ports not kept", extra=about(file=command.config.state_file, error=str(error)))


def _check_handle(handle: Handle) -> None:
    """A handle is one name in the folder of mounts, and one in that of records. Raises Malformed."""
    if "/" in handle or handle in (".", ".."):
        raise Malformed(f"handle: {handle!r} cannot be the name of a file")
    file_name(handle)


def _ours(network: PluginList) -> Mapping[str, Any]:
    """The configuration of our plugin in a list, if it is there."""
    return next((plugin for plugin in network.plugins if plugin["type"] == plugins.OURS), {})


def _skipped(command: Command, problems: list[str]) -> list[str]:
    for problem in problems:
        log.warning(
            "an egress rule is not valid and lets nothing out", extra=about(handle=command.handle, rule=problem)
        )
    return [f"{command.config.prefix}: rule skipped: {problem}\n" for problem in problems]


def _told(error: Exception, doing: str) -> str:
    text = str(error)
    if isinstance(error, plugins.PluginFailed | plugins.PluginUnavailable):
        return f"{doing}{'add network list failed' if 'up' in doing else 'del network failed'}: {text}"
    if isinstance(error, Unavailable):
        return f"{doing}{text}; this may pass, try again"
    return text
