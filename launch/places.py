"""The nodes that a job runs on, each reserved by a placement group of its own.

A group for each node, not one for all: a node that is lost gives its group back, and another takes its place at once.
Ray notices that a node died after about 14 s; `is_there` asks the node itself, whose port refuses in the same moment.
"""

import errno
import socket
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from launch.checks import Crew

PROBE_S, PROBES = 1.0, 3
"""A node that does not answer to so many connections, within so long each, is not there."""
_SHORT_HERE = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)
"""What this machine lacks says nothing of another."""
GRANT_S = 5.0
"""How long a node that seemed free may take to grant its place."""
POLL_S = 0.25


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster."""

    id: str
    address: str
    port: int
    """Of its raylet."""

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:6]})"

    @property
    def label(self) -> dict[str, str]:
        return {"ray.io/node-id": self.id}


class Places:
    """The nodes that are ours. `crew` says what one has to give. Leaving gives all back."""

    def __init__(self, crew: Crew) -> None:
        self._bundle = {"CPU": float(crew.per_node)} | ({"GPU": float(crew.per_node)} if crew.device == "cuda" else {})
        self._groups: dict[Node, PlacementGroup] = {}
        self._lost: set[str] = set()

    def take(
        self,
        count: int,
        timeout_s: float,
        prefer: Collection[Node] = (),
        go_on: Callable[[], bool] = lambda: True,
    ) -> list[Node]:
        """Up to `count` more nodes, as soon as there are so many, or what there is after `timeout_s`, or once `go_on`
        says no."""
        deadline = time.monotonic() + timeout_s
        taken: list[Node] = []
        refused: set[Node] = set()
        while len(taken) < count:
            free = sorted(set(self.free()) - refused, key=lambda node: node not in prefer)[: count - len(taken)]
            asked, granted_by = [(node, self._ask(node)) for node in free], time.monotonic() + GRANT_S
            for node, group in asked:
                if group.wait(max(0.1, granted_by - time.monotonic())):
                    self._groups[node] = group
                    taken.append(node)
                else:
                    remove_placement_group(group)
                    refused.add(node)
            if time.monotonic() > deadline or not go_on():
                break
            if len(taken) < count:
                time.sleep(POLL_S)
        return taken

    def free(self) -> list[Node]:
        """Nodes that are not ours, are not going away, and have room now."""
        from ray._private.state import available_resources_per_node

        room, leaving, ours = available_resources_per_node(), draining(), {node.id for node in self._groups}
        found = []
        for node in alive():
            has = room.get(node.id, {})
            enough = all(has.get(kind, 0) >= amount for kind, amount in self._bundle.items())
            if enough and node.id not in ours | self._lost | leaving:
                found.append(node)
        missing = gone(found)
        return [node for node in found if node not in missing]

    def give_back(self, node: Node, *, lost: bool = False) -> None:
        """Without it from now on; lost: it never comes back under this id."""
        if lost:
            self._lost.add(node.id)
        if group := self._groups.pop(node, None):
            remove_placement_group(group)

    def close(self) -> None:
        for node in list(self._groups):
            self.give_back(node)

    def options(self, node: Node) -> dict[str, Any]:
        """Of an actor in our part of `node`, or on it if none is ours. The place pays for the CPUs."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        if group := self._groups.get(node):
            strategy: Any = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        else:
            strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        return {"num_cpus": 0, "scheduling_strategy": strategy}

    def _ask(self, node: Node) -> PlacementGroup:
        group: PlacementGroup = placement_group(
            [self._bundle], strategy="STRICT_PACK", bundle_label_selector=[node.label]
        )
        return group


def alive() -> list[Node]:
    """The nodes that Ray counts as alive."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], int(node["NodeManagerPort"]))
        for node in ray.nodes()
        if node["Alive"]
    ]


def draining() -> set[str]:
    """Ids of nodes that will be taken away: Ray was told of a preemption, or to drain them."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def is_there(node: Node) -> bool:
    """Whether the node's raylet takes a connection. A refusal is the kernel's word; silence may be the network's."""
    for _ in range(PROBES):
        try:
            with socket.create_connection((node.address, node.port), timeout=PROBE_S):
                return True
        except TimeoutError:
            continue
        except OSError as error:
            return error.errno in _SHORT_HERE
    return False


def gone(nodes: Collection[Node]) -> set[Node]:
    """Those of `nodes` that are not there, all asked at once."""
    if not nodes:
        return set()
    with ThreadPoolExecutor(len(nodes), thread_name_prefix="probe") as threads:
        answers = threads.map(is_there, nodes)
        return {node for node, there in zip(nodes, answers, strict=True) if not there}
