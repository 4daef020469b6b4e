"""Snapshot processes on a Ray cluster: one detached actor a node, which dies with its node and with nothing else.

Ray places them and finds them again by name; all else goes over their own sockets (`checkpoint/snapshots/wire.py`):
nothing of a snapshot is pickled or passes through Ray's object store. They take no CPU of the placement: they encode on
cores that are idle. The token passes through Ray, whose connections the cluster has to protect.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from checkpoint.snapshots.format import FORMAT, OTHER_VERSION
from checkpoint.snapshots.process import KILLED, LOOPBACK, drop_node
from checkpoint.snapshots.roster import Roster
from checkpoint.snapshots.wire import NodeAddress

NAMESPACE = "atoll-snapshots"
_RETRY_S = 0.2
_LOOK_S = 0.5
END_S = 5.0
"""After which a process ends itself where Ray does not end it."""
SILENT_S = 30.0
"""After which a process that does not say what it is counts as hung."""


def start_snapshot_processes(
    run: bytes,
    nodes: Sequence[str],
    rank_nodes: Sequence[int],
    *,
    hold_s: float = 900.0,
    timeout_s: float = 60.0,
    say: Callable[[str], None],
    go_on: Callable[[], bool] = lambda: True,
) -> Roster | None:
    """A process on each of `nodes` (Ray's node ids): the one from before, with what it holds, else a new one.

    run: `trainer.run.run_id`. rank_nodes: by rank, which of `nodes` it runs on. go_on: asked while it takes its time;
    None is returned once it says no. One of another version of Atoll is ended, one that does not answer is killed, and
    `say` is told. Call it again after a loss, with the nodes that there are then. ValueError where one does not start
    in time.
    """
    deadline = time.monotonic() + timeout_s
    told: dict[str, dict[str, Any]] = {}
    ended: set[str] = set()
    token = secrets.token_bytes(32)
    while missing := [node for node in nodes if node not in told]:
        if not go_on():
            return None
        addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
        if gone := [node for node in missing if node not in addresses]:
            raise ValueError(f"snapshots: nodes {', '.join(gone)} are not in the Ray cluster any more")
        found = {node: actor for node in missing if (actor := _find(run, node)) is not None}
        told |= _ask(found, min(deadline, time.monotonic() + SILENT_S), go_on, partial(_kill, say))
        for node in [node for node in missing if node in told and told[node].get("format", 0) != FORMAT]:
            _end(told.pop(node), ended, say)
        token = next((bytes.fromhex(said["token"]) for said in told.values()), token)
        # On one machine nothing need be seen from outside, whatever address Ray took.
        alone = len(set(addresses.values())) == 1
        fresh = {}
        for node in set(missing) - set(found):
            with suppress(ValueError):  # the name of one that has just died is free in a moment
                fresh[node] = _start(run, node, token, LOOPBACK if alone else addresses[node], hold_s)
        told |= _ask(fresh, deadline, go_on)
        if time.monotonic() > deadline:
            raise ValueError(
                f"the snapshot process of nodes {', '.join(missing)} did not start within {timeout_s:g} s; "
                f"checkpoint.snapshot_every_steps=0 does without"
            )
        if len(told) < len(nodes):
            time.sleep(_RETRY_S)
    return Roster(
        run=run,
        token=token,
        nodes=tuple(NodeAddress(told[node]["label"], told[node]["host"], told[node]["port"]) for node in nodes),
        rank_nodes=tuple(rank_nodes),
    )


def _name(run: bytes, node: str) -> str:
    return f"atoll-snapshot-{run.hex()}-{node}"


def _find(run: bytes, node: str) -> Any:
    try:
        return ray.get_actor(_name(run, node), namespace=NAMESPACE)
    except ValueError:
        return None


def _start(run: bytes, node: str, token: bytes, host: str, hold_s: float) -> Any:
    actor: Any = ray.remote(SnapshotActor)
    return actor.options(
        num_cpus=0,
        max_restarts=0,
        max_concurrency=2,
        name=_name(run, node),
        namespace=NAMESPACE,
        lifetime="detached",
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(run, node, token, host, hold_s)


def _end(told: dict[str, Any], ended: set[str], say: Callable[[str], None]) -> None:
    """End a process of another version, once; its name is free when it has given its memory back."""
    if told["label"] in ended:
        return
    if not ended:
        say(OTHER_VERSION)
    ended.add(told["label"])
    drop_node(NodeAddress(told["label"], told["host"], told["port"]), bytes.fromhex(told["token"]))


def _kill(say: Callable[[str], None], node: str, actor: Any) -> None:
    say(f"the snapshot process of node {node[:12]} has said nothing for {SILENT_S:g} s; {KILLED}")
    with suppress(RayError):
        ray.kill(actor)


def _ask(
    actors: dict[str, Any],
    deadline: float,
    go_on: Callable[[], bool],
    silent: Callable[[str, Any], None] = lambda node, actor: None,
) -> dict[str, dict[str, Any]]:
    """By node what each says of itself; those that are dead are left out, and those that do not answer, of which
    `silent` is told."""
    calls = {node: actor.describe.remote() for node, actor in actors.items()}
    pending = list(calls.values())
    while pending and go_on():
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=_LOOK_S)
        if time.monotonic() > deadline:
            for node in [node for node, call in calls.items() if call in pending]:
                silent(node, actors[node])
            break
    found = {}
    for node, call in calls.items():
        with suppress(RayError):
            found[node] = ray.get(call, timeout=0)
    return found


class SnapshotActor:
    """The actor: a `SnapshotNode` on a thread. It ends its process when the node is dropped or left alone."""

    def __init__(self, run: bytes, node: str, token: bytes, host: str, hold_s: float) -> None:
        import os
        import signal
        import threading

        from checkpoint.snapshots.node import SnapshotNode
        from checkpoint.snapshots.process import NICENESS

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one for the whole job is for the workers
        os.nice(NICENESS)
        # A node that comes back is another one: a label of its own, as what it held counts as lost.
        label = f"{node[:12]}-{secrets.token_hex(2)}"
        self._node = SnapshotNode(run, label, token, host, hold_s=hold_s)
        self._told = {"label": label, "host": host, "port": self._node.port, "token": token.hex(), "format": FORMAT}
        self._told["pid"] = os.getpid()

        own = ray.get_runtime_context().current_actor

        def serve() -> None:
            self._node.serve()
            with suppress(RayError):
                ray.kill(own)  # Ray tells all drivers of a process that ends without its knowledge
            time.sleep(END_S)
            os._exit(0)

        threading.Thread(target=serve, name="snapshots", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        return self._told
