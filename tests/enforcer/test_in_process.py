"""Small changes of legacy tables made in this process: as iptables-restore makes them, and of no rule of another's."""

import random
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyroute2 import netns

from bus.messages import Ports, Protocol, Tag
from services.enforcer import in_process, iptables
from services.enforcer.in_process import changes
from services.enforcer.iptables import Iptables, difference
from services.enforcer.rules import ChainId, Rules, rule
from services.enforcer.tree import ACCEPT_FLOW, Sources, allowing, app_chains
from tests.enforcer.world import Namespace

CHAIN = ChainId("filter", "sb-a-0")
ACCEPT = {ChainId("filter", ACCEPT_FLOW): (rule(to="ACCEPT"),)}


def rules(*tags: int) -> Rules:
    return tuple(allowing(Tag(tag), Ports(Protocol.TCP, 80, 80 + tag)) for tag in tags)


def hashes(*tags: int) -> tuple[str, ...]:
    return tuple(one.hash for one in rules(*tags))


@pytest.mark.parametrize(
    ("held", "wanted", "position", "removed", "added"),
    [
        ((1, 2, 4), (1, 2, 3, 4), 2, (), (3,)),
        ((1, 2, 3), (1, 3), 1, (2,), ()),
        ((1, 2, 3), (1, 5, 3), 1, (2,), (5,)),
        ((), (1,), 0, (), (1,)),
        ((1, 1), (1,), 1, (1,), ()),
    ],
)
def test_what_is_between_the_same_beginning_and_end(
    held: tuple[int, ...], wanted: tuple[int, ...], position: int, removed: tuple[int, ...], added: tuple[int, ...]
) -> None:
    found = changes({CHAIN: hashes(*held)}, {CHAIN: rules(*wanted)})
    assert found is not None
    assert (found[0].position, found[0].removed, found[0].added) == (position, hashes(*removed), rules(*added))


def test_much_and_chains_built_in_are_left_to_the_program() -> None:
    many = tuple(range(1, 2 + in_process.MAX_CHANGES))
    assert changes({CHAIN: ()}, {CHAIN: rules(*many)}) is None
    assert changes({}, {CHAIN: rules(*many[1:])}) is None
    assert changes({}, {ChainId("filter", "FORWARD"): rules(1)}) is None
    assert changes({CHAIN: ()}, {CHAIN: rules(1), ChainId("raw", "sb-x"): ()}) is None


@pytest.mark.kernel
def test_as_the_program_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand changes here and by the program, in two namespaces: the same rules in the same order."""
    pytest.importorskip("iptc")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    monkeypatch.setattr(iptables, "LOCK_WAIT", 20)
    chance = random.Random(1)  # noqa: S311 (the same changes each time)
    ours, theirs = Namespace("here"), Namespace("there")
    with ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1) as there:
        try:
            here.submit(netns.setns, ours.name).result()
            there.submit(netns.setns, theirs.name).result()
            mine, other = Iptables("legacy"), Iptables("legacy")
            other._in_process = None
            used = []
            write = mine._in_process.write  # type: ignore[union-attr]
            monkeypatch.setattr(mine._in_process, "write", lambda *given: used.append(write(*given)) or used[-1])
            sources: dict[Tag, tuple[Ports, ...]] = {}
            for one, thread in ((mine, here), (other, there)):
                thread.submit(one.write, difference(one.picture, ACCEPT | wanted(sources))).result()
            memory = 0
            for number in range(300):
                for _ in range(chance.randint(1, 2)):
                    tag, start = Tag(chance.randint(1, 40)), chance.randint(1, 99)
                    protocol = chance.choice(list(Protocol))
                    if sources.pop(tag, None) is None:
                        sources[tag] = (Ports(protocol, start, chance.randint(start, 100)),)
                here.submit(mine.write, difference(mine.picture, wanted(sources))).result()
                if number % 30 == 0:
                    there.submit(other.write, difference(other.picture, wanted(sources))).result()
                    assert (
                        ours.exec("iptables-legacy-save -t filter").splitlines()[1:-1]
                        == (theirs.exec("iptables-legacy-save -t filter").splitlines()[1:-1])
                    )
                if number == 100:
                    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert used.count(True) > 150
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 10_000, "kilobytes"
            # A new chain, and a rule that leads there.
            other_chain, new = ChainId("filter", "sb-g-0"), ChainId("filter", "sb-a-1")
            more = {other_chain: (rule("-d 10.255.1.2/32", to=new.name),), new: rules(7)}
            here.submit(mine.write, difference(mine.picture, more)).result()
            there.submit(other.write, difference(other.picture, wanted(sources) | more)).result()
            assert used[-1]
            assert sorted(ours.exec("iptables-legacy-save -t filter").splitlines()[1:-1]) == sorted(
                theirs.exec("iptables-legacy-save -t filter").splitlines()[1:-1]
            )
            # Another rule where ours is thought to be: nothing of it is touched here, the program makes the chain anew.
            ours.exec(f"iptables-legacy -w -I {CHAIN.name} 1 -s 1.2.3.4 -j ACCEPT")
            sources.popitem()
            before = len(used)
            here.submit(mine.write, difference(mine.picture, wanted(sources))).result()
            assert used[before:] == [False]
            assert "1.2.3.4" not in ours.exec("iptables-legacy-save -t filter")
            # Another one in the place of one of ours, so that there are as many: it is not even taken apart.
            ours.exec(f"iptables-legacy -w -R {CHAIN.name} 1 -m recent --name x --set -j ACCEPT")
            monkeypatch.setattr(mine._in_process._iptc.Table, "create_rule", None)  # type: ignore[union-attr]
            del sources[min(sources)]
            here.submit(mine.write, difference(mine.picture, wanted(sources))).result()
            assert used[before:] == [False] * 2
            assert "recent" not in ours.exec("iptables-legacy-save -t filter")
        finally:
            ours.close()
            theirs.close()


def wanted(sources: Sources) -> dict[ChainId, Rules]:
    return app_chains(CHAIN.name, sources)
