"""For tests that break a running job: the job, a cluster of raylets that can be killed, and what an undisturbed job has
as losses.

As a program, `supervised.py WORLD ROOT [key=value ...]`, it is that undisturbed job: the same trainer on as many forked
processes, without Ray, without a supervisor.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from launch.failures import FILE, TEAM_FILE, FailureRecord

STEPS = 60
SMALL = (
    "launch.device=cpu launch.threads=1 model.dim=32 model.num_heads=2 model.ffn_dim=64 model.num_layers=1 "
    "train.seq_len=64 train.global_batch_size=12 train.micro_batch_size=1 train.eval_sequences=12 "
    f"train.sample_tokens=0 train.steps={STEPS} optimizer.schedule=constant logger=none"
).split()
SNAPSHOTS = "checkpoint.snapshot_every_steps=1"


class Run:
    """``atoll train`` as a process, under ``run.name=job``. What it printed is in `said` once it has ended."""

    def __init__(self, root: Path, *overrides: str, within: Sequence[str] = ()) -> None:
        """within: a command that runs another, as the arguments before its own."""
        self.folder = root / "job"
        self._output = root / "output.txt"
        command = [*within, *atoll_command("train", *SMALL, *overrides, f"run.root={root}", "run.name=job")]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=root, start_new_session=True)

    @property
    def said(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def team(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.folder / TEAM_FILE).read_text())
        return tree

    @property
    def generation(self) -> int:
        """0 before the first start."""
        return int(self.team["generation"]) if (self.folder / TEAM_FILE).exists() else 0

    @property
    def pids(self) -> list[int]:
        return [rank["pid"] for rank in self.team["ranks"]]

    @property
    def failures(self) -> list[FailureRecord]:
        return FailureRecord.read(self.folder / FILE)

    @property
    def steps(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    @property
    def losses(self) -> dict[int, float]:
        return losses(self.folder)

    def wait(self, what: Callable[[], bool], timeout_s: float = 150) -> None:
        """Until `what` holds; fails where the run ends first, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def end(self, timeout_s: float = 150) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Leave nothing behind, however the test ended."""
        if self.process.poll() is None:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for process in family:
                process.kill()
            self.process.wait(20)
            psutil.wait_procs(family, timeout=10)


def atoll_command(*args: str) -> list[str]:
    return [str(Path(sys.executable).with_name("atoll")), *args]


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


class Raylets:
    """A Ray cluster on this machine: a head without CPUs, and nodes with `cpus` each that can be killed."""

    def __init__(self, count: int, cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self._cpus = cpus
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = {}
        for _ in range(count):
            self.add()
        self._cluster.wait_for_nodes()
        self.address: str = self._cluster.address

    def add(self, **environment: str) -> str:
        """Its id. environment: of its processes, beside ours."""
        node = self._cluster.add_node(num_cpus=self._cpus, env_vars=environment)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    @property
    def ids(self) -> list[str]:
        """Of the nodes that are there, without the head."""
        return [str(node_id) for node_id in self._nodes]

    def kill(self, node_id: str) -> None:
        """SIGKILL for the raylet and all its workers, as if the machine were gone."""
        node = self._nodes.pop(node_id)
        roots = [psutil.Process(each.process.pid) for kind in node.all_processes.values() for each in kind]
        family = [*roots, *(child for root in roots for child in root.children(recursive=True))]
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue

    def drain(self, node_id: str, notice_s: float = 300) -> None:
        """Tell the cluster that the machine is claimed back, as a cloud's notice of preemption does (``ray drain-node``
        makes this call). Ray gives the node no more work; it goes when it is killed."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason, deadline_ms = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), (time.time() + notice_s) * 1000
        taken, why = GcsClient(address=self.address).drain_node(node_id, reason, "claimed back", int(deadline_ms))
        assert taken, why

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def running(root: Path, *overrides: str, within: Sequence[str] = ()) -> Iterator[Run]:
    run = Run(root, *overrides, within=within)
    try:
        yield run
    finally:
        run.close()


@contextmanager
def undisturbed(world: int, root: Path, *overrides: str) -> Iterator[Callable[[], dict[int, float]]]:
    """Starts the undisturbed job; the call waits for its losses."""
    job = subprocess.Popen([sys.executable, __file__, str(world), str(root), *overrides])

    def wait() -> dict[int, float]:
        assert job.wait(120) == 0
        return losses(root / "undisturbed")

    try:
        yield wait
    finally:
        job.kill()
        job.wait()


def main() -> None:
    world, root = int(sys.argv[1]), Path(sys.argv[2])
    import torch
    import torch._dynamo
    import torch.distributed as dist

    from launch.cli import _run_hydra
    from launch.config import register
    from trainer.loop import Trainer

    jobs = []
    register()
    overrides = [
        *SMALL,
        f"run.root={root}",
        "run.name=undisturbed",
        f"parallel.levels={{worker: {world}}}",
        *sys.argv[3:],
    ]
    _run_hydra(overrides, lambda config, _: jobs.append(config.job()) or 0)
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            store = dist.FileStore(str(root / "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            Trainer(jobs[0], emit=lambda event: None).train()
            dist.barrier()
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


if __name__ == "__main__":
    main()
