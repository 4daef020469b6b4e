"""Nodes with real snapshot processes on this machine, and ranks that save and restore; for the tests of snapshots."""

import itertools
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from checkpoint.options import CheckpointOptions
from checkpoint.snapshots.generation import Generation
from checkpoint.snapshots.node import SnapshotNode
from checkpoint.snapshots.process import start_process
from checkpoint.snapshots.rank import Snapshots
from checkpoint.snapshots.recovery import inventories
from checkpoint.snapshots.roster import Roster
from checkpoint.snapshots.wire import NodeAddress
from offload.state import Piece

NUMEL = 300_001
KINDS = ("master", "exp_avg")


def ended(pid: int) -> bool:
    """Whether a process is no more, though its parent may not have asked for it yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def tensor(kind: str, step: int, name: str = "w", numel: int = NUMEL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * 1000 + KINDS.index(kind) + 10 * len(name))
    return torch.randn(numel, generator=generator)


def pieces(rank: int, world: int, step: int, numel: int = NUMEL) -> list[Piece]:
    """An uneven share of two parameters and kinds; every element once, over all ranks."""
    found = []
    for name, kind in itertools.product(("w", "bias"), KINDS):
        size = numel if name == "w" else 77
        cuts = [size * i * (i + 1) // (world * (world + 1)) for i in range(world + 1)]
        whole = tensor(kind, step, name, size)
        start, stop = cuts[rank], cuts[rank + 1]
        found.append(Piece(name=name, kind=kind, start=start, stop=stop, shape=(size,), tensor=whole[start:stop]))
    return found


class ThreadRanks:
    """The ranks of a job as threads of this process; surface of `checkpoint.ranks.Ranks`."""

    def __init__(self, rank: int, world: int, shared: dict[str, Any]) -> None:
        self.rank, self.world, self._shared = rank, world, shared
        shared.setdefault("barrier", threading.Barrier(world))

    def tell(self, message: bytes) -> bytes:
        if self.rank == 0:
            self._shared["told"] = message
        self._shared["barrier"].wait(30)
        told = self._shared["told"]
        self._shared["barrier"].wait(30)
        return told

    def gather(self, message: bytes) -> list[bytes]:
        self._shared[f"message {self.rank}"] = message
        self._shared["barrier"].wait(30)
        found = [self._shared[f"message {rank}"] for rank in range(self.world)] if self.rank == 0 else []
        self._shared["barrier"].wait(30)
        return found


class Nodes:
    """`count` snapshot processes, each a node of its own."""

    def __init__(self, count: int, *, folder: Path, run: bytes | None = None, hold_s: float = 60) -> None:
        self.run, self.token, self.folder = run or secrets.token_bytes(16), secrets.token_bytes(32), folder
        self.said: list[str] = []
        self._hold_s = hold_s
        self._number = itertools.count()
        with ThreadPoolExecutor(count) as pool:
            self.nodes = list(pool.map(self._start, [f"n{next(self._number)}" for _ in range(count)]))
        self.pids = {label: found["pid"] for label, found in inventories(self.roster([])).items()}

    def _start(self, label: str) -> NodeAddress:
        return start_process(self.run, label, self.token, hold_s=self._hold_s, log=self.folder / f"{label}.log")

    def replace(self, number: int) -> None:
        """A new, empty node in the place of one that was killed."""
        self.nodes[number] = self._start(f"n{next(self._number)}")
        self.pids |= {label: found["pid"] for label, found in inventories(self.roster([])).items()}

    def roster(self, rank_nodes: Sequence[int], without: Sequence[int] = ()) -> Roster:
        """`without`: nodes that cannot be reached: nothing listens at their port."""
        nodes = [
            NodeAddress(node.label, node.host, 1) if number in without else node
            for number, node in enumerate(self.nodes)
        ]
        return Roster(run=self.run, token=self.token, nodes=tuple(nodes), rank_nodes=tuple(rank_nodes))

    def kill(self, number: int) -> None:
        """SIGKILL, and wait until it is gone."""
        pid = self.pids[self.nodes[number].label]
        os.kill(pid, signal.SIGKILL)
        while _alive(pid):
            time.sleep(0.01)

    def end(self) -> None:
        for pid in self.pids.values():
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)

    def ranks(
        self,
        world: int,
        act: Callable[[Snapshots, int], Any],
        *,
        parity: int,
        roster: Roster | None = None,
        group_nodes: int | None = None,
        every: str = "1",
    ) -> Any:
        """Run `act(snapshots, rank)` on every rank at the same time, spread over the nodes; what rank 0 returned."""
        shared: dict[str, Any] = {}
        roster = roster or self.roster([rank * len(self.nodes) // world for rank in range(world)])
        options = CheckpointOptions(snapshot_every_steps=every, parity=parity, group_nodes=group_nodes)

        def one(rank: int) -> Any:
            snapshots = Snapshots(roster, options, ThreadRanks(rank, world, shared), self.said.append)
            try:
                return act(snapshots, rank)
            except BaseException:
                shared["barrier"].abort()
                raise
            finally:
                snapshots.close()

        with ThreadPoolExecutor(world) as pool:
            calls = [pool.submit(one, rank) for rank in range(world)]
            errors = [error for call in calls if (error := call.exception())]
            for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
                raise error
            return calls[0].result()

    def save(
        self, world: int, steps: Sequence[int], *, parity: int, numel: int = NUMEL, group_nodes: int | None = None
    ) -> None:
        """Snapshots of these steps, one after the other, all committed."""

        def act(snapshots: Snapshots, rank: int) -> None:
            snapshots.start(pieces(rank, world, 0, numel), {"rank": rank}, {"step": 0})
            for step in steps:
                snapshots.save(step, pieces(rank, world, step, numel), {"rank": rank, "step": step}, {"step": step})
                snapshots.wait_copied()
                snapshots.wait()
                assert snapshots.error() is None, snapshots.error()

        self.ranks(world, act, parity=parity, group_nodes=group_nodes)

    @contextmanager
    def saving(self, step: int, *, parity: int, resume: int | None = None) -> Iterator[None]:
        """A rank a node, which have a committed snapshot of `step` and are taking one of `step + 1` meanwhile."""
        world, over = len(self.nodes), threading.Event()

        def act(snapshots: Snapshots, rank: int) -> None:
            if resume is not None:
                snapshots.open(resume)
            snapshots.start(pieces(rank, world, 0), {"rank": rank}, {"step": 0})
            for number in (step, step + 1):
                snapshots.save(number, pieces(rank, world, number), {"rank": rank, "step": number}, {"step": number})
                if number == step:
                    snapshots.wait()
                    assert snapshots.error() is None, snapshots.error()
            over.wait()

        with ThreadPoolExecutor(1) as pool:
            ranks = pool.submit(self.ranks, world, act, parity=parity)
            try:
                yield
            finally:
                over.set()
                ranks.result()


class ThreadNodes(Nodes):
    """Nodes that are threads of this process: the same code over the same sockets and shared memory."""

    def __init__(self, count: int, *, folder: Path, hold_s: float = 60) -> None:
        self._running: dict[str, tuple[SnapshotNode, threading.Thread]] = {}
        super().__init__(count, folder=folder, hold_s=hold_s)

    def _start(self, label: str) -> NodeAddress:
        node = SnapshotNode(self.run, label, self.token, "127.0.0.1", hold_s=self._hold_s)
        thread = threading.Thread(target=node.serve, daemon=True)
        thread.start()
        self._running[label] = node, thread
        return NodeAddress(label, "127.0.0.1", node.port)

    def generation(self, number: int) -> Generation:
        found = self._running[self.nodes[number].label][0]._generation
        assert found is not None
        return found

    def end(self) -> None:
        for node, _ in self._running.values():
            node._ended.set()
        for _, thread in self._running.values():
            thread.join()


def check_restored(reader: Any, step: int, readers: int = 1, numel: int = NUMEL) -> None:
    """What `readers` ranks read of `reader` is bitwise the state of `step`."""
    assert reader.step == step and reader.meta == {"step": step}
    for rank in range(reader.world):
        assert reader.rank_state(rank) == {"rank": rank, "step": step}
    for name, kind in itertools.product(("w", "bias"), KINDS):
        size = numel if name == "w" else 77
        cuts = [size * i // readers for i in range(readers + 1)]
        parts = [reader.read(name, kind, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), tensor(kind, step, name, size)), (name, kind)


def _alive(pid: int) -> bool:
    """Whether a process still runs; one that is dead but not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except FileNotFoundError:
        return False
