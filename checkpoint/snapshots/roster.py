"""Who takes part in snapshots: the nodes and their processes, and how they are cut into groups.

A `Roster` says where the processes are now. A `Plan` says who holds what of the versions that were made under it: it is
written beside each version, so that after any losses the survivors still say what there was. Its `generation` is new
each time the ranks start; nodes are known in it by label, never by address.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from checkpoint.erasure.layout import GroupLayout
from checkpoint.options import CheckpointOptions
from checkpoint.snapshots.wire import NodeAddress

GROUP_NODES = 8
"""Nodes in a group where the options do not say: RS(7+1) costs 14% more memory, and a repair reads 7 chunks."""


@dataclass(frozen=True, kw_only=True)
class Roster:
    run: bytes
    """16 bytes that no other run has, the same each time the run is started."""
    token: bytes
    """Secret of the run's processes."""
    nodes: tuple[NodeAddress, ...]
    rank_nodes: tuple[int, ...]
    """By rank, which of `nodes` it runs on."""

    def dumps(self) -> bytes:
        tree = asdict(self) | {"run": self.run.hex(), "token": self.token.hex()}
        return json.dumps(tree).encode()

    @classmethod
    def loads(cls, content: bytes) -> "Roster":
        tree = json.loads(content)
        return cls(
            run=bytes.fromhex(tree["run"]),
            token=bytes.fromhex(tree["token"]),
            nodes=tuple(NodeAddress(**node) for node in tree["nodes"]),
            rank_nodes=tuple(tree["rank_nodes"]),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the state of one generation lies over the nodes."""

    generation: int
    """The first version that may be made under it."""
    world: int
    parity: int
    groups: tuple[tuple[str, ...], ...]
    """Labels of the nodes of each group, in the layout's order."""
    sizes: tuple[int, ...]
    """By group, the bytes of its largest node's state."""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for group in self.groups for label in group)

    @property
    def coordinator(self) -> str:
        return self.groups[0][0]

    def place(self, label: str) -> tuple[int, int]:
        """Group of a node, and its place in it."""
        return next((number, group.index(label)) for number, group in enumerate(self.groups) if label in group)

    def layout(self, group: int) -> GroupLayout:
        return GroupLayout(len(self.groups[group]), self.parity, self.sizes[group])

    def tree(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of(cls, tree: dict[str, object]) -> "Plan":
        """ValueError where `tree` is not what `tree()` makes."""
        try:
            groups = tuple(tuple(str(label) for label in group) for group in tree["groups"])  # type: ignore[attr-defined]
            sizes = tuple(int(size) for size in tree["sizes"])  # type: ignore[attr-defined]
            numbers = {name: int(tree[name]) for name in ("generation", "world", "parity")}  # type: ignore[call-overload]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a plan of snapshots: {error!r}") from error
        if not groups or len(groups) != len(sizes) or len({*sum(groups, ())}) != len(sum(groups, ())):
            raise ValueError("a plan of snapshots with groups that do not fit")
        return cls(groups=groups, sizes=sizes, **numbers)


def check_nodes(options: CheckpointOptions, num_nodes: int) -> tuple[int, list[int]]:
    """Parity, and the sizes of the groups, for so many nodes. ValueError where they do not fit."""
    largest = options.group_nodes or GROUP_NODES
    if options.group_nodes and options.group_nodes > num_nodes:
        raise ValueError(
            f"checkpoint.group_nodes={options.group_nodes}: there are {num_nodes} nodes; lower it, or leave it out"
        )
    num_groups = -(-num_nodes // largest)
    sizes = [num_nodes // num_groups + (number < num_nodes % num_groups) for number in range(num_groups)]
    parity = options.parity if options.parity is not None else int(min(sizes) > 1)
    if parity >= min(sizes):
        where = f"a group of {min(sizes)} of {num_nodes} nodes" if num_groups > 1 else f"{num_nodes} nodes"
        where = "one node" if num_nodes == 1 else where
        most = min(sizes) - 1
        raise ValueError(
            f"checkpoint.parity={parity} over {where}: at most {most}, as one node at least must be left; "
            f"set checkpoint.parity={most}, or add nodes (launch.nodes=)"
        )
    return parity, sizes


def cut_groups(labels: Sequence[str], sizes: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    groups, first = [], 0
    for size in sizes:
        groups.append(tuple(labels[first : first + size]))
        first += size
    return tuple(groups)
