"""A start of the ranks: cut the nodes into groups, and tell each its part of the new plan."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from checkpoint.snapshots.area import areas, whole
from checkpoint.snapshots.fragment import PIECE_BYTES
from checkpoint.snapshots.recovery import retire
from checkpoint.snapshots.roster import Plan, Roster, cut_groups
from checkpoint.snapshots.segment_files import NoRoom
from checkpoint.snapshots.wire import WORK_S, Wire


def configure(
    roster: Roster,
    sizes: Sequence[int],
    parity: int,
    group_sizes: Sequence[int],
    *,
    keep: int | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """By rank 0. sizes: bytes that each rank needs. keep: the version that was restored; all others go.

    Returns the ``generation``, by node the ``paths`` of segments, and by rank the ``areas`` (start, bytes) in the state
    of its node. CheckpointError where a node is not there, NoRoom where it has too little memory.
    """
    by_node = [
        areas([(rank, sizes[rank]) for rank, node in enumerate(roster.rank_nodes) if node == number])
        for number in range(len(roster.nodes))
    ]
    firsts = list(itertools.accumulate(group_sizes, initial=0))
    plan = Plan(
        generation=retire(roster) + 1,
        world=len(sizes),
        parity=parity,
        groups=cut_groups([node.label for node in roster.nodes], group_sizes),
        sizes=tuple(  # chunks of whole pieces: checkpoint/snapshots/area.py, [Note: one pass]
            whole(max(size for _, size in by_node[a:b]), (b - a - parity) * PIECE_BYTES)
            for a, b in itertools.pairwise(firsts)
        ),
    )
    common = {"do": "configure", "plan": plan.tree(), "nodes": [asdict(node) for node in roster.nodes], "keep": keep}
    with ExitStack() as stack:  # all at once: each makes its memory
        wires = [stack.enter_context(Wire.connect(node, roster.token)) for node in roster.nodes]
        for wire, (its, _) in zip(wires, by_node, strict=True):
            wire.send(common | {"areas": [[rank, *area] for rank, area in its.items()]})
        answers = [wire.answer(wait_s=WORK_S)[0] for wire in wires]
    paths, codes = [], dict[str, list[str]]()
    for node, answer in zip(roster.nodes, answers, strict=True):
        if "no_room" in answer:
            raise NoRoom(answer["no_room"])
        paths.append(answer["path"])
        codes.setdefault(answer.get("code", ""), []).append(node.label)
        if answer["note"]:
            report(answer["note"])
    _say_code(codes, report, again=keep is not None)
    return {
        "generation": plan.generation,
        "paths": paths,
        "areas": {rank: area for its, _ in by_node for rank, area in its.items()},
    }


def _say_code(codes: Mapping[str, list[str]], report: Callable[[str], None], *, again: bool) -> None:
    """codes: what encodes, and on which nodes. again: it was said before, and is only where it is slow."""
    for code, labels in codes.items():
        if slow := " by numpy" in code:
            code += f"; 50 to 100 times slower than ISA-L, which comes with pyeclib: install it on {', '.join(labels)}"
        if code and (slow or not again):
            report(f"snapshots are coded as {code}")
