"""Which snapshot can be restored: who answers is asked what it holds, and every byte is checked before it is trusted.

See docs/commit-protocol.md, Restoring. Nothing is changed here, but by `retire`: what was passed over is thrown away
when the ranks start anew (`SnapshotNode`, configure).
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from checkpoint.erasure.protocol import recoverable
from checkpoint.errors import CheckpointError
from checkpoint.snapshots.roster import Plan, Roster
from checkpoint.snapshots.wire import WORK_S, Message, NodeAddress, Wire, WireError

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A version that can be read whole, from the nodes in `holders`."""

    version: int
    step: int
    plan: Plan
    holders: Mapping[str, NodeAddress]
    """By label, the nodes that have prepared it."""
    bad: Mapping[str, list[list[int]]]
    """By label and fragment (k chunks, then m parities), the pieces whose CRC-32C is wrong."""

    @property
    def lost(self) -> tuple[str, ...]:
        return tuple(label for label in self.plan.labels if label not in self.holders)

    @property
    def num_bad(self) -> int:
        return sum(len(pieces) for fragments in self.bad.values() for pieces in fragments)

    def dumps(self) -> bytes:
        holders = {label: asdict(address) for label, address in self.holders.items()}
        tree = {"version": self.version, "step": self.step, "plan": self.plan.tree(), "holders": holders}
        return json.dumps(tree | {"bad": dict(self.bad)}).encode()

    @classmethod
    def loads(cls, content: bytes) -> "Found":
        tree = json.loads(content)
        holders = {label: NodeAddress(**address) for label, address in tree["holders"].items()}
        return cls(
            version=tree["version"], step=tree["step"], plan=Plan.of(tree["plan"]), holders=holders, bad=tree["bad"]
        )

    def __str__(self) -> str:
        text = f"step {self.step} in memory (version {self.version}, {self.plan.world} ranks"
        text += f", nodes {', '.join(self.lost)} lost" if self.lost else ""
        return text + (f", {self.num_bad} damaged pieces repaired)" if self.num_bad else ")")


def inventories(roster: Roster, say: Say = lambda text: None) -> dict[str, Message]:
    """What each node that answers holds, by label; who does not is said. All are asked at once: a node lets a version
    that is nearly there come to its end first."""
    found = {}
    with ExitStack() as stack:
        asked: list[tuple[str, Wire]] = []
        for node in roster.nodes:
            try:
                wire = stack.enter_context(Wire.connect(node, roster.token))
                wire.send({"do": "inventory"})
                asked.append((node.label, wire))
            except CheckpointError as error:
                say(f"{error}: what it held counts as lost")
        for label, wire in asked:
            try:
                found[label] = wire.answer()[0]
            except CheckpointError as error:
                say(f"{error}: what it held counts as lost")
    return found


def newest_snapshot(roster: Roster, say: Say = lambda text: None) -> Found | None:
    """The newest version that can be restored, checked on all nodes that hold it. Says why newer ones cannot."""
    held = inventories(roster, say)
    if roster.nodes and not held:
        say("no snapshot process can be reached: there is nothing in memory to restore")
    addresses = {node.label: node for node in roster.nodes}
    plans: dict[int, Plan] = {}
    steps: dict[int, dict[int, dict[str, int]]] = {}  # generation -> version -> label -> step
    for label, inventory in held.items():
        for version, entry in inventory["held"].items():
            plan = Plan.of(entry["plan"])
            if label in plan.labels and plans.setdefault(plan.generation, plan) == plan:
                steps.setdefault(plan.generation, {}).setdefault(int(version), {})[label] = int(entry["step"])
    candidates = [(version, plans[generation]) for generation, found in steps.items() for version in found]
    for version, plan in sorted(candidates, key=lambda candidate: candidate[0], reverse=True):
        holders = steps[plan.generation][version]
        whole = f"the snapshot of step {max(holders.values())} in memory"
        if missing := _missing(plan, version, holders):
            say(f"{whole} cannot be restored: {missing}")
        elif len(set(holders.values())) > 1:
            say(f"{whole} cannot be restored: its nodes are of steps {sorted(set(holders.values()))}")
        else:
            step = max(holders.values())
            where = {label: addresses[label] for label in holders}
            bad = _check(roster, where, version, say)
            found = Found(
                version=version, step=step, plan=plan, holders={label: where[label] for label in bad}, bad=bad
            )
            problem = _missing(plan, version, found.holders) or _too_damaged(found)
            if not problem:
                return found
            say(f"{whole} cannot be restored: {problem}")
    return None


def retire(roster: Roster) -> int:
    """Before a start: every node ends what the start before was making. The newest number that any of them has issued.

    WireError where a node is not there.
    """
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire.connect(node, roster.token)) for node in roster.nodes]
        for wire in wires:  # all at once: they may be waiting for each other
            wire.send({"do": "retire"})
        return max(int(wire.answer()[0]["last_issued"]) for wire in wires)


def _missing(plan: Plan, version: int, holders: Mapping[str, object]) -> str:
    """Which nodes' loss is too much; empty where enough are there."""
    groups = []
    for number, group in enumerate(plan.groups):
        held = {place: [version] for place, label in enumerate(group) if label in holders}
        groups.append((held, plan.layout(number).k))
    if recoverable(groups) == [version]:
        return ""
    for number, (held, k) in enumerate(groups):
        if len(held) < k:
            lost = [label for label in plan.groups[number] if label not in holders]
            return (
                f"{len(lost)} nodes of a group of {len(plan.groups[number])} are without it ({', '.join(lost)}), "
                f"checkpoint.parity={plan.parity} makes up for {plan.parity}"
            )
    raise AssertionError("a version with k nodes of every group is recoverable")


def _check(roster: Roster, where: Mapping[str, NodeAddress], version: int, say: Say) -> dict[str, list[list[int]]]:
    """Every node checks all it holds, at the same time. By label what is damaged; a node that fails is left out."""
    wires: dict[str, Wire] = {}
    bad: dict[str, list[list[int]]] = {}
    try:
        for label, address in where.items():
            try:
                wires[label] = Wire.connect(address, roster.token)
                wires[label].send({"do": "check", "version": version})
            except WireError as error:
                say(str(error))
        for label, wire in wires.items():
            try:
                bad[label] = wire.answer(wait_s=WORK_S)[0]["bad"]
            except CheckpointError as error:
                say(str(error))
    finally:
        for wire in wires.values():
            wire.close()
    return bad


def _too_damaged(found: Found) -> str:
    """The first stripe in which more is lost or damaged in one place than its parity makes up for."""
    plan = found.plan
    for number, names in enumerate(plan.groups):
        layout = plan.layout(number)
        for stripe in layout.stripes():
            bad: dict[int, int] = {}
            lost = 0
            for element in stripe.elements:
                label = names[element.node]
                if label not in found.holders:
                    lost += 1
                    continue
                fragment = (layout.k if element.parity else 0) + element.offset // layout.chunk_bytes
                for piece in found.bad[label][fragment]:
                    bad[piece] = bad.get(piece, 0) + 1
            if lost + max(bad.values(), default=0) > layout.m:
                return (
                    f"{lost} fragments of stripe {stripe.number} of group {number} are lost and "
                    f"{max(bad.values(), default=0)} damaged in one place; checkpoint.parity={layout.m}"
                )
    return ""
