"""What containers may reach off the overlay: the table of security groups, and what containers bring themselves.

Rules are kept in lists that are named by a digest of their content: equal lists, of whichever groups and containers,
are one, so what the kernel holds grows with distinct lists only.

Which lists are a container's (contract/cell.md 6.4):

- What its runtime opened for it since it was made, always.
- Staging containers: the groups that are the default for staging, and those bound to their space for staging. Apps
  and tasks: likewise for running. Other workloads: none.
- What its runtime gave it when it was made, instead of groups: where groups are not followed, or not known; and for a
  container without a space, since the Cloud Controller does not know it, and nobody else speaks for it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from bus.messages import Container, Handle, SecurityGroup, Workload
from bus.security_groups import EgressRule, GroupId, SpaceId
from bus.tables import Update
from bus.wire import pack


@dataclass(frozen=True, slots=True)
class RuleList:
    """Rules that go together, known by the digest of their content."""

    digest: str
    rules: tuple[EgressRule, ...] = field(compare=False)
    logs: bool = field(compare=False)

    @classmethod
    def of(cls, rules: Iterable[EgressRule]) -> "RuleList":
        """Those that log first: a flow is logged if any rule that allows it says so."""
        ordered = tuple(sorted(rules, key=lambda rule: not rule.log))
        digest = blake2b(pack([rule.encode() for rule in ordered]), digest_size=8).hexdigest()
        return cls(digest, ordered, any(rule.log for rule in ordered))


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a container may go: the lists that allow it, and the kind of workload whose deny networks it has."""

    denied: Workload | None = None
    """Tasks count as apps; None for other workloads."""
    lists: tuple[RuleList, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lists)


class Groups:
    """The table of security groups, indexed by who has them."""

    def __init__(self) -> None:
        self._used = False
        self._reaches: dict[tuple[object, ...], Reach] = {}
        self._lists: dict[GroupId, RuleList] = {}
        self._own: dict[Handle, tuple[Container, RuleList, RuleList]] = {}
        self._groups: dict[GroupId, SecurityGroup] = {}
        # Both by whether they are for staging, or for running.
        self._defaults: dict[bool, set[GroupId]] = {True: set(), False: set()}
        self._bound: dict[bool, defaultdict[SpaceId, set[GroupId]]] = {True: defaultdict(set), False: defaultdict(set)}

    @property
    def used(self) -> bool:
        """Whether the table's content counts: it is known, and groups are followed."""
        return self._used

    def use(self, used: bool) -> None:
        self._used = used
        self._reaches.clear()

    def update(self, update: Update[SecurityGroup]) -> None:
        """Take one revision of the table."""
        self._reaches.clear()
        for (guid,), group in update.changes.items():
            self._forget(GroupId(guid))
            if group is None:
                continue
            self._groups[group.guid] = group
            self._lists[group.guid] = RuleList.of(group.rules)
            for staging in (True, False):
                if group.staging_default if staging else group.running_default:
                    self._defaults[staging].add(group.guid)
                for space in group.staging_spaces if staging else group.running_spaces:
                    self._bound[staging][space].add(group.guid)

    def _forget(self, guid: GroupId) -> None:
        group = self._groups.pop(guid, None)
        self._lists.pop(guid, None)
        if group is None:
            return
        for staging in (True, False):
            self._defaults[staging].discard(guid)
            for space in group.staging_spaces if staging else group.running_spaces:
                self._bound[staging][space].discard(guid)
                if not self._bound[staging][space]:
                    del self._bound[staging][space]

    def of(self, container: Container) -> tuple[SecurityGroup, ...]:
        """The groups of the table that are in force for a container."""
        if not self.used or container.space is None or container.workload is None:
            return ()
        staging = container.workload is Workload.STAGING
        guids = self._defaults[staging] | self._bound[staging].get(container.space, set())
        return tuple(self._groups[guid] for guid in sorted(guids))

    def named(self, digest: str) -> list[str]:
        """The names of the groups that have this list of rules."""
        return sorted(self._groups[guid].name for guid, rules in self._lists.items() if rules.digest == digest)

    def reach(self, container: Container) -> Reach:
        """Where a container may go off the overlay. Containers with the same reach get the same object."""
        egress, opened = self._lists_of(container)
        workload = Workload.APP if container.workload is Workload.TASK else container.workload
        own = (opened,) if self.used and container.space is not None else (egress, opened)
        which = workload, container.space, *(each.digest for each in own)
        known = self._reaches.get(which)
        if known is None:
            lists = {*own, *(self._lists[group.guid] for group in self.of(container))}
            ordered = sorted((each for each in lists if each.rules), key=lambda each: (not each.logs, each.digest))
            known = self._reaches[which] = Reach(workload, tuple(ordered))
        return known

    def forget(self, handle: Handle) -> None:
        """A container is gone, and with the last of them what was noted of what each may reach."""
        self._own.pop(handle, None)
        if len(self._reaches) > 2 * len(self._own):
            self._reaches.clear()

    def _lists_of(self, container: Container) -> tuple[RuleList, RuleList]:
        """Its own rules as lists: those it was made with, and those opened since. Made once for each container."""
        known = self._own.get(container.handle)
        if known is None or known[0] is not container:
            known = container, RuleList.of(container.egress), RuleList.of(container.opened)
            self._own[container.handle] = known
        return known[1:]
