"""The commit protocol, gone through state by state: every order of events and crashes of a small group.

The model is docs/commit-protocol.md; what a node or the coordinator decides, and which data a parity needs, is asked of
the real functions (`protocol`, `GroupLayout`). Protocols with one mistake each show that the search finds mistakes.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pytest

from checkpoint.erasure import GroupLayout, Stripe, protocol


class Node(NamedTuple):
    slots: tuple[int, ...]
    """Prepared version in each slot, 0 for none."""
    writing: tuple[int, ...] = ()
    """Version and slot being written; 1 if own data is whole, else 0; 1 if the parity is. Empty: nothing."""
    worker_dead: bool = False
    lost: bool = False
    """Its memory is gone (or a replacement's, still empty)."""


class State(NamedTuple):
    nodes: tuple[Node, ...]
    version: int
    """Of the snapshot under way, 0 for none."""
    commits: tuple[int, ...] | None
    """What the coordinator knows; None: it died, or is recovering and has not asked yet."""
    rebuilding: int
    """Version that is being rebuilt where it lacks; 0 for none."""
    budget: tuple[int, int, int]
    """Crashes still to come: of workers, nodes, the coordinator."""
    # For the invariants alone; no decision reads them:
    promised: tuple[int, ...]
    """The commits that must be recoverable, newest last."""
    written: tuple[int, ...]
    """By version, from 0: how many nodes have written all their data of it."""
    given_up: frozenset[int]
    """Versions that recovery passed over."""


@dataclass(frozen=True)
class Model:
    n: int
    m: int
    num_slots: int
    versions: int = 2
    """Snapshots taken, or tried, after the first commits."""
    budget: tuple[int, int, int] = (1, 1, 1)
    keep: Callable[..., set[int]] = protocol.versions_to_keep
    recoverable: Callable[..., list[int]] = protocol.recoverable
    needs_parity: bool = True
    commit_at: int = 0
    """Nodes that must have prepared, fewer than all."""

    @cached_property
    def sources(self) -> list[frozenset[int]]:
        """By node: the nodes whose data its parity is made of."""
        layout = GroupLayout(self.n, self.m, 1)
        kept = [{stripe for stripe, number in layout.held(node) if number >= layout.k} for node in range(self.n)]
        return [
            frozenset(e.node for stripe in stripes for e in layout.stripe(stripe).elements if not e.parity)
            for stripes in kept
        ]

    @cached_property
    def stripes(self) -> tuple[Stripe, ...]:
        return GroupLayout(self.n, self.m, 1).stripes()

    def first(self) -> State:
        """All slots full of commits."""
        commits = tuple(range(1, self.num_slots + 1))
        nodes = (Node(commits),) * self.n
        promised = commits[-(self.num_slots - 1) :]
        written = (0, *(self.n for _ in commits), *(0 for _ in range(self.versions)))
        return State(nodes, 0, commits, 0, self.budget, promised, written, frozenset())

    def survey(self, state: State) -> list[int]:
        held = {number: [v for v in node.slots if v] for number, node in enumerate(state.nodes) if not node.lost}
        return self.recoverable([(held, self.n - self.m)])

    def after(self, state: State) -> Iterator[tuple[str, State]]:
        yield from self._crashes(state)
        broken = state.commits is None or any(node.worker_dead or node.lost for node in state.nodes)
        if broken and not state.rebuilding:
            yield from self._recover(state)
        if state.rebuilding:
            yield from self._rebuild(state)
        elif not broken:
            yield from self._coordinate(state)
        if not state.rebuilding:
            for number, node in enumerate(state.nodes):
                if not (node.worker_dead or node.lost):
                    yield from self._work(state, number, node)
        # All that have prepared may have told so before anyone died.
        if state.version and state.commits is not None and not state.rebuilding:
            prepared = [node for node in state.nodes if state.version in node.slots]
            if len(prepared) >= (self.commit_at or self.n):
                commits = (*state.commits, state.version)
                promised = (*state.promised, state.version)[-(self.num_slots - 1) :]
                yield f"commit {state.version}", state._replace(version=0, commits=commits, promised=promised)

    def _crashes(self, state: State) -> Iterator[tuple[str, State]]:
        workers, nodes, coordinators = state.budget
        for number, node in enumerate(state.nodes):
            if workers and not (node.worker_dead or node.lost):
                dead = node._replace(worker_dead=True, writing=())
                budget = (workers - 1, nodes, coordinators)
                yield f"worker {number} dies", _with(state, number, dead)._replace(budget=budget)
            if nodes and not node.lost:
                gone = Node((0,) * self.num_slots, lost=True)
                budget = (workers, nodes - 1, coordinators)
                yield f"node {number} is lost", _with(state, number, gone)._replace(budget=budget)
        if coordinators:
            budget = (workers, nodes, coordinators - 1)
            yield "the coordinator dies", state._replace(commits=None, version=0, rebuilding=0, budget=budget)

    def _coordinate(self, state: State) -> Iterator[tuple[str, State]]:
        assert state.commits is not None
        if state.version:
            yield f"give up {state.version}", state._replace(version=0)
            return
        held = [version for node in state.nodes for version in node.slots]
        issued = [node.writing[0] for node in state.nodes if node.writing]
        version = max([*held, *issued, *state.given_up, *state.commits]) + 1  # one that no attempt has had
        if version < len(state.written):
            yield f"start {version}", state._replace(version=version)

    def _work(self, state: State, number: int, node: Node) -> Iterator[tuple[str, State]]:
        if state.version and state.commits is not None and state.version not in node.slots:
            if not node.writing or node.writing[0] < state.version:
                keep = self.keep(state.commits, self.num_slots)
                slot = protocol.slot_for([v or None for v in node.slots], keep)
                begun = Node(_put(node.slots, slot, 0), (state.version, slot, 0, 0))
                yield f"{number} begins {state.version}", _with(state, number, begun)
        if not node.writing:
            return
        version, slot, data, parity = node.writing
        if not data:
            written = _with(state, number, node._replace(writing=(version, slot, 1, parity)))
            counts = state.written
            counts = (*counts[:version], counts[version] + 1, *counts[version + 1 :])
            yield f"{number} has written {version}", written._replace(written=counts)
        if not parity and all(_has_data(state.nodes[source], version) for source in self.sources[number]):
            encoded = node._replace(writing=(version, slot, data, 1))
            yield f"{number} gets parity of {version}", _with(state, number, encoded)
        if data and (parity or not self.needs_parity):
            prepared = Node(_put(node.slots, slot, version))
            yield f"{number} prepares {version}", _with(state, number, prepared)

    def _recover(self, state: State) -> Iterator[tuple[str, State]]:
        found = self.survey(state)
        if not found:
            return  # from disk: nothing in memory is claimed
        chosen = found[0]
        seen = {v for node in state.nodes for v in node.slots if v} | ({state.version} - {0})
        seen |= {node.writing[0] for node in state.nodes if node.writing}
        # Survivors throw away what is newer than what was chosen, and what they were writing.
        nodes = tuple(
            node._replace(slots=tuple(v if v <= chosen else 0 for v in node.slots), writing=(), worker_dead=False)
            for node in state.nodes
        )
        given_up = state.given_up | {v for v in seen if v > chosen}
        commits = tuple(sorted(found))
        yield (
            f"recover at {chosen}",
            state._replace(nodes=nodes, version=0, commits=commits, rebuilding=chosen, given_up=given_up),
        )

    def _rebuild(self, state: State) -> Iterator[tuple[str, State]]:
        assert state.commits is not None
        lacking = [number for number, node in enumerate(state.nodes) if state.rebuilding not in node.slots]
        if not lacking:  # only now does training go on, and the version count as committed
            newest = sorted({*state.promised, state.rebuilding})[-(self.num_slots - 1) :]
            yield "go on", state._replace(rebuilding=0, promised=tuple(newest))
        if state.rebuilding not in self.survey(state):
            yield "lost too many", state._replace(rebuilding=0, commits=None)
            return
        for number in lacking:
            node = state.nodes[number]
            slot = protocol.slot_for([v or None for v in node.slots], self.keep(state.commits, self.num_slots))
            rebuilt = Node(_put(node.slots, slot, state.rebuilding))
            yield f"{number} is rebuilt at {state.rebuilding}", _with(state, number, rebuilt)

    def wrong(self, state: State) -> str:
        """Which promise is broken in `state`; empty if none is."""
        found = self.survey(state)
        for version in found:
            if state.written[version] < self.n:
                return f"version {version} can be restored, but not all of it was ever there"
            without = {number for number, node in enumerate(state.nodes) if version not in node.slots}
            if any(sum(e.node not in without for e in s.elements) < self.n - self.m for s in self.stripes):
                return f"version {version} is said to be recoverable, with too few elements of a stripe"
            if version in state.given_up:
                return f"version {version} comes back after recovery passed over it"
        lacking = sum(node.lost for node in state.nodes)
        if lacking <= self.m:
            if not found or found[0] < state.promised[-1]:
                return f"version {state.promised[-1]} was committed; restored would be {found[:1]}"
            if self.budget[1] <= self.m:
                gone = [version for version in state.promised if version not in found]
                if gone:
                    return f"of the newest commits {state.promised}, {gone} cannot be restored"
        return ""


def _with(state: State, number: int, node: Node) -> State:
    return state._replace(nodes=(*state.nodes[:number], node, *state.nodes[number + 1 :]))


def _put(slots: tuple[int, ...], slot: int, version: int) -> tuple[int, ...]:
    return (*slots[:slot], version, *slots[slot + 1 :])


def _has_data(node: Node, version: int) -> bool:
    return version in node.slots or (node.writing[:1] == (version,) and node.writing[2] == 1)


def _rotated(state: State) -> State:
    """One of the n states that are the same but for the numbers of the nodes; the layout rotates with them."""
    nodes = state.nodes
    return state._replace(nodes=min(nodes[i:] + nodes[:i] for i in range(len(nodes))))


def search(model: Model, limit: int = 1_000_000) -> tuple[int, set[str], list[str]]:
    """States seen, kinds of events seen, and the shortest way to a broken promise (empty if there is none)."""
    start = model.first()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    frontier, events = [start], set()
    while frontier:
        following = []
        for state in frontier:
            for event, reached in model.after(state):
                reached = _rotated(reached)
                events.add(" ".join(word for word in event.split() if not word.isdigit()))
                if reached in came_from:
                    continue
                came_from[reached] = (state, event)
                following.append(reached)
                problem = model.wrong(reached)
                if problem:
                    way, step = [problem], came_from[reached]
                    while step is not None:
                        way.append(step[1])
                        step = came_from[step[0]]
                    return len(came_from), events, way[::-1]
        frontier = following
        assert len(came_from) < limit, "the model has grown too large to search"
    return len(came_from), events, []


_EVENTS = {
    "start", "begins", "has written", "gets parity of", "prepares", "commit", "give up", "recover at", "is rebuilt at",
    "go on",
}  # fmt: skip
_CRASHES = ("worker dies", "node is lost", "the coordinator dies")

_SMALL = [(2, 1, (1, 1, 1), 1), (3, 1, (1, 1, 0), 1), (3, 1, (0, 1, 0), 2), (3, 2, (0, 2, 1), 1), (4, 1, (0, 1, 1), 1),
          (4, 2, (0, 2, 0), 1)]  # fmt: skip
_LARGE = [(2, 1, (1, 2, 1), 2), (3, 1, (1, 1, 1), 2), (3, 1, (0, 2, 1), 2), (3, 2, (1, 2, 0), 1), (4, 1, (1, 1, 0), 1),
          (4, 1, (0, 1, 0), 2), (4, 2, (0, 2, 1), 1), (4, 2, (1, 2, 0), 1)]  # fmt: skip


def _search_all(n: int, m: int, budget: tuple[int, int, int], versions: int, num_slots: int) -> None:
    num_states, events, way = search(Model(n, m, num_slots, versions, budget))
    print(f"{num_states} states")
    assert not way
    assert events >= _EVENTS | {crash for crash, times in zip(_CRASHES, budget, strict=True) if times}


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("n, m, budget, versions", _SMALL)
def test_no_order_of_events_breaks_a_promise(
    n: int, m: int, budget: tuple[int, int, int], versions: int, num_slots: int
):
    _search_all(n, m, budget, versions, num_slots)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("n, m, budget, versions", _LARGE)
def test_no_order_of_events_breaks_a_promise_with_more_of_them(
    n: int, m: int, budget: tuple[int, int, int], versions: int, num_slots: int
):
    _search_all(n, m, budget, versions, num_slots)


def _keep_one_fewer(committed, num_slots):
    return set(sorted(committed, reverse=True)[: num_slots - 2])


def _one_node_fewer_is_enough(groups):
    return protocol.recoverable([(held, k - 1) for held, k in groups])


def _all_nodes_are_needed(groups):
    return protocol.recoverable([(held, k + 1) for held, k in groups])


@pytest.mark.parametrize(
    "mistake, problem",
    [
        ({"keep": _keep_one_fewer}, "cannot be restored"),
        ({"keep": _keep_one_fewer, "num_slots": 2}, "was committed"),
        ({"needs_parity": False}, "not all of it was ever there"),
        ({"recoverable": _one_node_fewer_is_enough}, "too few elements"),
        ({"recoverable": _all_nodes_are_needed}, "was committed"),
        ({"commit_at": 2, "num_slots": 2}, "was committed"),
        ({"commit_at": 2}, "was committed"),
    ],
)
def test_a_protocol_with_one_mistake_is_found_out(mistake: dict, problem: str):
    _, _, way = search(Model(**{"n": 3, "m": 1, "num_slots": 3, "versions": 2, "budget": (1, 1, 0)} | mistake))
    print("; ".join(way))
    assert way and problem in way[-1]


@pytest.mark.parametrize("n, m", [(n, m) for n in range(2, 9) for m in range(1, 4) if m < n])
def test_k_prepared_nodes_hold_k_elements_of_every_stripe_and_a_whole_version(n: int, m: int):
    """Even if chunks are sent before a node's data is whole: any node's chunk has a parity among those prepared."""
    layout = GroupLayout(n, m, 1)
    for prepared in itertools.combinations(range(n), layout.k):
        for stripe in layout.stripes():
            assert sum(element.node in prepared for element in stripe.elements) == layout.k
            behind = [element.node for element in stripe.elements[: layout.k] if element.node not in prepared]
            parities = [element.node for element in stripe.elements[layout.k :] if element.node in prepared]
            assert len(parities) >= len(behind)


def test_decisions():
    assert protocol.versions_to_keep([1, 5, 3], 2) == {5}
    assert protocol.versions_to_keep([1, 5, 3], 3) == {5, 3}
    with pytest.raises(ValueError, match="num_slots=1"):
        protocol.versions_to_keep([1], 1)
    assert protocol.slot_for([4, None, 6], {4, 6}) == 1
    assert protocol.slot_for([4, 3, 6], {6}) == 1
    one, other = {0: [1, 2, 3], 1: [2, 3], 2: [2]}, {3: [2, 4], 4: [2, 3, 4], 5: []}
    assert protocol.recoverable([(one, 2)]) == [3, 2]
    assert protocol.recoverable([(one, 2), (other, 2)]) == [2]
    assert protocol.recoverable([]) == []
