"""`silkbus explain`: may one app reach another, and why, or why not.

Three answers are put side by side, and where they differ is said: what the policies say, what the rules of each cell
with an instance make of it, and whether that cell's kernel has these rules. With --probe the connection is tried, too.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

from cli import arguments as command_line
from cli import output, terminal
from cli.apps import App
from cli.client import Policy
from cli.errors import Failed, WrongUsage
from cli.history import full_name, local
from cli.policies import ports, protocol
from cli.session import Session

REFUSED = 1
ERROR = 2
CONTRADICTION = 3
EXIT_CODES = (
    "exit codes: 0 allowed, 1 not allowed, 2 an error, 3 policies, cells, kernels or probe contradict each other"
)
GUID_LENGTH = 32
HEADER = ("cell", "container", "address", "verdict", "kernel", "why")
REACHED = ("connected", "sent", "refused")
"""What a probe meets when no rule is in the way: an app that does not listen refuses, too."""


def show(argv: list[str]) -> int:
    """`silkbus explain`; the exit code."""
    parser = command_line.api_parser(
        "explain",
        f"Say whether an app may open connections to another one's port, and why, or why not.\n{EXIT_CODES}",
        [
            ("frontend backend --port 8080", "TCP"),
            ("frontend db -s prod -o other --protocol udp --port 53", "to an app of another space and org"),
            ("frontend backend --port 8080 --probe", "have frontend's containers try it; needs network.admin"),
            ("frontend backend --port 8080 --output json", "for programs"),
        ],
    )
    parser.add_argument("source", metavar="SOURCE_APP")
    parser.add_argument("destination", metavar="DESTINATION_APP")
    parser.add_argument("-s", dest="space", metavar="SPACE", help="the destination's space")
    parser.add_argument("-o", dest="org", metavar="ORG", help="the destination's org")
    parser.add_argument("--port", type=_port, required=True, metavar="N", help="the destination's port")
    parser.add_argument("--protocol", type=protocol, default="tcp", metavar="tcp|udp", help="default: tcp")
    parser.add_argument("--probe", action="store_true", help="try the connection from within the source's containers")
    command_line.add_output(parser, short=False)

    def run(arguments: argparse.Namespace) -> int:
        if arguments.org is not None and arguments.space is None:
            raise WrongUsage("A space must be provided when an org is provided, but the '-s' flag was not specified.")
        session = Session(arguments)
        source = session.source(arguments.source)
        destination = session.destination(arguments.destination, arguments.org, arguments.space, source)
        query = {"source": source.guid, "destination": destination.guid}
        query |= {"protocol": arguments.protocol, "port": str(arguments.port)}
        query |= {"probe": "true"} if arguments.probe else {}
        answer = session.client.get(f"/explain?{urlencode(query)}")
        try:
            found = list(contradictions(answer))
            if arguments.output != "table":
                output.structured(arguments.output, {**answer, "contradictions": found})
            else:
                named = json.loads(_with_names(json.dumps(answer), source, destination))
                _print(named, source, destination, arguments, list(contradictions(named)))
            allowed = bool(answer["allowed"])
        except (KeyError, TypeError, ValueError) as error:
            raise Failed(f"{session.client.server.url} answered what is not understood: {error!r}") from None
        if found:
            return CONTRADICTION
        return 0 if allowed else REFUSED

    return command_line.run(parser, argv, run, failed=ERROR)


def contradictions(answer: Any) -> Iterator[str]:
    """Where policies, cells, kernels and probes do not agree."""
    allowed, revision = answer["allowed"], answer["revision"]
    said = "allow" if allowed else "do not allow"
    sources, destinations = _instances(answer, "source"), _instances(answer, "destination")
    # The destination's cells decide; the source's must not stop what is allowed.
    for end, instances, decides in (("source", sources, False), ("destination", destinations, True)):
        for instance in instances:
            where = f"{instance['cell']} ({instance['handle']}, {end})"
            passes = {"passes": True, "refused": False}.get(instance["verdict"])
            if passes is not None and passes != allowed and (decides or allowed):
                behind = instance["revision"] - revision
                verb = "lets it pass" if passes else "refuses it"
                text = f"The policies {said} it, and {where} {verb}: {instance['reason']}"
                yield text + (f"; its kernel has revision {instance['revision']} of {revision}" if behind < 0 else "")
            if instance["kernel_agrees"] is False:
                differences = "; ".join(instance["differences"]) or "not as planned"
                yield f"The kernel of {where} does not have the rules that its enforcer wants: {differences}"
    verdicts = {instance["address"]: instance["verdict"] for instance in destinations}
    for instance in sources:
        for probe in instance["probes"] or ():
            reached, expected = probe["outcome"] in REACHED, verdicts.get(probe["address"]) == "passes"
            # A rule refuses as an app does that is not there: only what gets through where it should not tells.
            if (probe["outcome"] == "connected" and not expected) or (expected and not reached):
                path = f"{instance['handle']} to {probe['address']}"
                verdict = verdicts.get(probe["address"], "unknown")
                yield f"Tried from {path}: {probe['outcome']}{_error(probe)}, while the verdict there is {verdict}"


def _with_names(text: str, *apps: App) -> str:
    """Cells know apps by their GUIDs only."""
    for app in apps:
        if len(app.guid) >= GUID_LENGTH:  # what is short may be part of another word
            text = text.replace(json.dumps(app.guid)[1:-1], json.dumps(app.name)[1:-1])
    return text


def _instances(answer: Any, end: str) -> list[Any]:
    return answer[end].get("instances") or []


def _error(probe: Any) -> str:
    return f" ({probe['error']})" if probe["error"] else ""


def _print(answer: Any, source: App, destination: App, arguments: argparse.Namespace, found: Sequence[str]) -> None:
    allowed = answer["allowed"]
    verdict = (
        terminal.coloured("Allowed", terminal.GREEN) if allowed else terminal.coloured("Not allowed", terminal.RED)
    )
    flow = f"{full_name(source)} → {full_name(destination)} {arguments.protocol} {arguments.port}"
    terminal.say(f"{verdict}: {flow} (revision {answer['revision']})")
    for item in answer["policies"]:
        terminal.say(f"  by the policy {_policy(item)}{_change('since', item['since'])}")
    for item in answer["removed"]:
        terminal.say(f"  the policy {_policy(item)} was removed{_change('at', item['at'])}")
    if not allowed:
        near = ", ".join(_policy(item) for item in answer["others"])
        terminal.say(f"  policies between the two: {near or 'none'}")
        place = f" -s {destination.space} -o {destination.org}" if destination.space else ""
        names = f"{source.name} {destination.name}{place}"
        change = f"silkbus add-network-policy {names} --protocol {arguments.protocol} --port {arguments.port}"
        terminal.say(f"  to allow it: {change}")
    for end, app in (("source", source), ("destination", destination)):
        tag = answer[end]["tag"]
        terminal.say(f"\n{end.capitalize()} {terminal.name(full_name(app))}: {f'tag {tag}' if tag else 'no tag'}")
        instances = _instances(answer, end)
        if instances:
            terminal.table(HEADER, [_row(instance) for instance in instances])
        elif answer["cells"] is not None:
            terminal.say("no cell that answered has an instance of it")
    _print_probes(answer)
    if answer["cells"] is None:
        terminal.say("\nThe cells could not be asked: no bus, or no leases are known. See `silkbus status`.")
    elif silent := answer["cells"]["silent"]["count"]:
        names = ", ".join(answer["cells"]["silent"].get("cells", ())) or f"{silent} of {answer['cells']['asked']}"
        terminal.say(f"\nCells that did not answer: {names}. What they have and do is not known.")
    for text in found:
        terminal.say(f"\n{terminal.coloured('Contradiction', terminal.RED)}: {text}")


def _print_probes(answer: Any) -> None:
    probes = [(instance, probe) for instance in _instances(answer, "source") for probe in instance["probes"] or ()]
    if probes:
        terminal.say("\nTried:")
        terminal.table(
            ("from", "to", "outcome", "ms"),
            [
                (instance["handle"], probe["address"], probe["outcome"] + _error(probe), f"{probe['milliseconds']:.1f}")
                for instance, probe in probes
            ],
        )


def _row(instance: Any) -> tuple[str, ...]:
    kernel = {True: "agrees", False: "differs", None: "unknown"}[instance["kernel_agrees"]]
    reason = instance["reason"] + (f" [{instance['chain']}]" if instance["chain"] else "")
    return instance["cell"], instance["handle"], instance["address"], instance["verdict"], kernel, reason


def _policy(item: Any) -> str:
    policy = Policy.decode(item["policy"])
    return f"{policy.protocol} {policy.ports}"


def _change(word: str, change: Any) -> str:
    if change is None:
        return ", it is not known when"
    return f", {word} revision {change['revision']} ({local(change['time'])}, by {change['user']})"


def _port(text: str) -> int:
    start, end = ports(text)
    if start != end or not 1 <= start <= 65535:
        raise WrongUsage(f"--port must be one port in 1-65535, not {text!r}")
    return start
