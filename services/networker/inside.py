"""What is in a container's own network namespace: looked at for CHECK, and given the redirects of Garden's proxy.

By programs started in that namespace (nsenter), so that no thread of ours ever is in another than the cell's.
"""

import asyncio
import json
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from services.networker import namespaces
from services.networker.errors import Failed, Unavailable
from services.networker.record import Attachment

TIMEOUT = 10.0
_DEFAULT = "default"


def problem(attachment: Attachment) -> str | None:
    """What is not as it was answered on ADD: interface, address and route inside, link on the cell. Blocks."""
    link = attachment.link
    if link is None:
        return "it has no link"
    place = f"{attachment.ifname} in {attachment.netns}"
    try:
        found = _ip(attachment.netns, "address", "show", "dev", attachment.ifname)
        routes = _ip(attachment.netns, "route", "show", "dev", attachment.ifname)
        if not found:
            return f"there is no {place}"
        interface = found[0]
        addresses = {each.get("local") for each in interface.get("addr_info", [])}
        if str(link.address) not in addresses:
            return f"{place} does not have the address {link.address}"
        if "UP" not in interface.get("flags", []):
            return f"{place} is down"
        if link.peer_mac is not None and interface.get("address") != link.peer_mac:
            return f"{place} has the MAC address {interface.get('address')}, not {link.peer_mac}"
        gateways = {route.get("gateway") for route in routes if route.get("dst") == _DEFAULT}
        if attachment.result is None and str(link.gateway) not in gateways:
            return f"{place} has no default route by {link.gateway}"
        if link.interface is not None and not (outside := _ip(None, "link", "show", "dev", link.interface)):
            return f"its link {link.interface} does not exist on the cell"
        if link.interface is not None and link.mac is not None and outside[0].get("address") != link.mac:
            return f"its link {link.interface} has the MAC address {outside[0].get('address')}, not {link.mac}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{place} cannot be looked at: {error}"
    return None


def _ip(netns: str | None, *arguments: str) -> list[dict[str, Any]]:
    """What `ip` says, in JSON; nothing for a device that is not there. Raises OSError or ValueError."""
    enter = [] if netns is None else ["nsenter", f"--net={netns}"]
    done = subprocess.run(  # noqa: S603 (names come from records that we wrote)
        [*enter, "ip", "-json", *arguments], capture_output=True, timeout=TIMEOUT, check=False, text=True
    )
    if done.returncode != 0:
        if "does not exist" in done.stderr or "Cannot find device" in done.stderr:
            return []
        raise OSError(done.stderr.strip() or f"ip ended with {done.returncode}")
    value: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return value


def redirects(cidr: str, *, ingress: bool, port: int) -> tuple[str, ...]:
    """The rules that lead a container's TCP to its proxy (contract/cell.md 1.4.6)."""
    target = f"-p tcp -j REDIRECT --to-port {port}"
    return (*((f"OUTPUT -d {cidr} {target}",) if cidr else ()), *((f"PREROUTING {target}",) if ingress else ()))


async def add_redirects(attachment: Attachment) -> None:
    """Put all of them in, or none. Raises Failed, with iptables' reason, or Unavailable."""
    await _restore(attachment.netns, (f"-A {rule}" for rule in attachment.redirects))


async def remove_redirects(attachment: Attachment) -> None:
    """Take them out, as far as they and the namespace are there."""
    if namespaces.is_gone(attachment.netns):
        return
    for rule in attachment.redirects:
        with suppress(Failed):
            await _restore(attachment.netns, [f"-D {rule}"])


async def _restore(netns: str, rules: Iterable[str]) -> None:
    text = "\n".join(["*nat", *rules, "COMMIT", ""])
    pipe = asyncio.subprocess.PIPE
    command = ["nsenter", f"--net={netns}", "iptables-restore", "--noflush", "--wait", "5"]
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        raise Failed(f"proxy redirect apply: {error}") from None
    try:
        async with asyncio.timeout(TIMEOUT):
            _, stderr = await process.communicate(text.encode())
    except TimeoutError:
        raise Unavailable(f"proxy redirect apply: iptables-restore did not end within {TIMEOUT:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = stderr.decode(errors="replace").strip()
        raise Failed(f"proxy redirect apply: do in container: iptables-restore error: {said}")
