"""What it takes to make the policies be what a file says, given those there are.

A file says all about its own spaces: those of its sources, and those it names by themselves. What it does not list is
*extra* if it is between an app of an own space and an app of a space that the file names at all; or if one end is such
an app, and the other end an app that nobody knows any more: the old one after a blue-green push. All other policies are
none of its business.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cli.apps import App, Apps, Place, place_text
from cli.client import Policy
from cli.errors import Failed, NotFound
from cli.manifest import Manifest, Reference, flat

Space = tuple[str, str]
"""Org and name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Policies to add, those that the file does not have, and those that are as it says. `apps` has all their apps."""

    add: list[Policy]
    extra: list[Policy]
    kept: list[Policy]
    apps: Mapping[str, App]

    @property
    def differs(self) -> bool:
        return bool(self.add or self.extra)


def make(manifest: Manifest, apps: Apps, present: Iterable[Policy], org: str | None, space: str | None) -> Plan:
    """The plan; `org` and `space`, if any, are those targeted: for apps that the file names without. Raises Failed."""
    found = resolve(manifest, apps, org, space)
    desired = dict.fromkeys(
        Policy(found[source].guid, found[destination].guid, ports.protocol, ports.start, ports.end)
        for source, destination, ports in flat(manifest.rules)
    )
    present = list(present)
    there = frozenset(present)
    others = [policy for policy in present if policy not in desired]
    sources = {source for rule in manifest.rules for source in rule.sources}
    own = _spaces(found[source] for source in sources)
    own |= {(_org_of(name, its_org or org, manifest), name) for its_org, name in manifest.spaces}
    named = own | _spaces(found.values())
    known = {app.guid: app for app in found.values()}
    for its_org, name in named:
        known |= {app.guid: app for app in apps.within(its_org, name)}
    near = [policy for policy in others if policy.source in known or policy.destination in known]
    known |= apps.known({guid for policy in near for guid in (policy.source, policy.destination)} - known.keys())
    extra = [policy for policy in near if _concerned(known[policy.source], known[policy.destination], own, named)]
    return Plan(
        add=[policy for policy in desired if policy not in there],
        extra=extra,
        kept=[policy for policy in desired if policy in there],
        apps=known,
    )


def _org_of(space: str, org: str | None, manifest: Manifest) -> str:
    if not org:
        raise Failed(f"{manifest.file}: space {space}: of which org? Write ORG/{space}, or `org: ORG`, or target one.")
    return org


def _concerned(source: App, destination: App, own: Collection[Space], named: Collection[Space]) -> bool:
    here, there = (source.org, source.space), (destination.org, destination.space)
    if not source.space:  # nobody knows it
        return there in named
    return here in own and (there in named or not destination.space)


def _spaces(apps: Iterable[App]) -> set[Space]:
    return {(app.org, app.space) for app in apps if app.space}


def resolve(manifest: Manifest, apps: Apps, org: str | None, space: str | None) -> dict[Reference, App]:
    """The app of each reference in the file. Raises Failed, which names all that there are not."""
    found: dict[Reference, App] = {}
    missing: list[tuple[int, str]] = []
    of_space: dict[Space, dict[Place, Reference]] = {}
    for reference, line in manifest.lines.items():
        if reference.guid:
            continue
        full = Place(reference.org or org or "", reference.space or space or "", reference.name)
        if full.org and full.space:
            of_space.setdefault((full.org, full.space), {})[full] = reference
        else:
            try:
                found[reference] = apps.find(reference.name, full.org or None, full.space or None)
            except Failed as error:
                missing.append((line, str(error)))
    for wanted in of_space.values():
        try:
            there = apps.find_all(wanted)
        except Failed as error:  # no such org or space, or nobody could be asked
            missing.append((min(manifest.lines[reference] for reference in wanted.values()), str(error)))
            continue
        for place, reference in wanted.items():
            if place in there:
                found[reference] = there[place]
            else:
                missing.append((manifest.lines[reference], _why_not(apps, place)))
    if missing:
        raise Failed("\n".join(f"{manifest.file}:{line}: {text}" for line, text in sorted(missing)))
    guids = apps.known(reference.guid for reference in manifest.lines if reference.guid)
    return found | {reference: guids[reference.guid] for reference in manifest.lines if reference.guid}


def _why_not(apps: Apps, place: Place) -> str:
    """Why there is not one app of this full name."""
    try:
        apps.find(place.name, place.org, place.space)
    except NotFound:
        pass
    except Failed as error:  # there are several
        return str(error)
    return f"App '{place.name}' not found{place_text(place.org, place.space)}."
