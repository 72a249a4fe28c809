"""Who has which subnet, as the worker follows it: the `leases` table on the bus, or the original's controller."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from bus.messages import Lease
from bus.tables.follower import State
from services.silk.tenure import Tenure


class Directory(Protocol):
    """All leases, kept up to date by `run`. `bus.tables.Replica` is one."""

    @property
    def entries(self) -> Mapping[tuple[str, ...], Lease]: ...

    @property
    def state(self) -> State: ...

    @property
    def revision(self) -> int: ...

    def listen(self, listener: Callable[[Any], None]) -> None: ...

    async def usable(self) -> None: ...

    async def run(self) -> None: ...


class Lessor(Protocol):
    """Who gives this cell its lease. Calls raise `LeaseDenied`, or an error of the bus, when there is no answer."""

    def may_have(self, lease: Lease) -> bool: ...

    async def acquire(self) -> Tenure: ...

    async def renew(self, tenure: Tenure) -> Tenure: ...

    async def release(self, tenure: Tenure) -> None: ...
