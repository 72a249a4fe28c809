"""The other two services of the cell as the networker calls them, their failures in its own terms."""

from ipaddress import IPv4Network
from typing import Any

from bus.decode import Fields, Malformed
from bus.local import Refused, Service, Unreachable
from bus.messages import Container, Handle
from services.networker.errors import Conflict, Failed, Rejected, Unavailable
from services.networker.record import Attachment, Link


class Neighbours:
    """Every call raises Unavailable (trying again may help) or Failed. Time-outs are in seconds."""

    def __init__(self, silk: Service, enforcer: Service, *, attach_timeout: float, admit_timeout: float) -> None:
        self._silk = silk
        self._enforcer = enforcer
        self.attach_timeout = attach_timeout
        self.admit_timeout = admit_timeout

    async def subnet(self) -> IPv4Network:
        """The cell's subnet, if containers can be attached."""
        answer = await _call(self._silk, "GET", "/", None, self.attach_timeout)
        return answer.network("overlay_subnet")

    async def attach(self, wanted: Attachment) -> Link:
        """Raises also Rejected or Conflict, where the silk worker finds that the caller is at fault."""
        # Not by the mount, which the silk worker sees only if it is in our mount namespace.
        netns = wanted.source or wanted.netns
        body = {"handle": wanted.handle, "netns": netns, "ifname": wanted.ifname, **wanted.wishes}
        at_fault = Rejected if wanted.wishes else Conflict
        answer = await _call(self._silk, "POST", "/attach", body, self.attach_timeout, at_fault)
        try:
            return Link.decode(answer)
        except Malformed as error:
            raise Failed(str(error)) from None

    async def detach(
        self, handle: Handle, netns: str | None, ifname: str | None, address: str | None, timeout: float
    ) -> None:
        body = {"handle": handle, "netns": netns, "ifname": ifname, "address": address}
        await _call(self._silk, "POST", "/detach", body, timeout)

    async def admit(self, record: Container) -> str:
        """Have the container's rules put into the kernel; the enforcer's instance that did it."""
        answer = await _call(self._enforcer, "POST", "/admit", {"container": record.encode()}, self.admit_timeout)
        return answer.text("instance")

    async def instance(self) -> str:
        """The enforcer's instance of now: another one than before knows nothing of what that was told."""
        return (await _call(self._enforcer, "GET", "/state", None, self.admit_timeout)).text("instance")

    async def forget(self, handle: Handle, timeout: float) -> None:
        await _call(self._enforcer, "POST", "/forget", {"handle": handle}, timeout)


async def _call(
    service: Service, method: str, target: str, body: Any, timeout: float, at_fault: type[Exception] = Failed
) -> Fields:
    """`at_fault` is raised for what the service says is the caller's fault."""
    try:
        return Fields(await service.call(method, target, body, timeout=timeout), f"{service.name} {target}")
    except Unreachable as error:
        raise Unavailable(f"{error}: see that silkbus-{service.name} runs, then try again") from None
    except Refused as error:
        kinds: dict[int, type[Exception]] = {503: Unavailable, 400: at_fault, 409: at_fault}
        kind = kinds.get(error.status, Failed)
        raise kind(f"{service.name}: {error}") from None
