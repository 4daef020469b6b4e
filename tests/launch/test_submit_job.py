"""The entrypoint of the RayJob, on a cluster as KubeRay makes it: a head without CPUs, workers that come later."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(200)]

SMALL = (
    "model.dim=32 model.num_heads=2 model.ffn_dim=64 model.num_layers=1 train.seq_len=64 train.eval_sequences=8 "
    "train.sample_tokens=0 train.steps=3 logger=none launch.device=cpu launch.nodes=2 launch.workers=2"
).split()


@pytest.fixture
def head() -> Iterator["object"]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def entrypoint(address: str, folder: Path, wait_s: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.node", "job", "--nodes", "2", "--wait-s", str(wait_s)],
        cwd=folder,
        env={**os.environ, "RAY_ADDRESS": address, "ATOLL_OVERRIDES": json.dumps([*SMALL, 'run.name="it\'s $HOME"'])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_it_waits_for_the_workers_and_trains(head, tmp_path: Path) -> None:
    run = entrypoint(head.address, tmp_path, 60)
    time.sleep(4)
    assert run.poll() is None
    head.add_node(num_cpus=1)
    head.add_node(num_cpus=1)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert "node 2 x worker 1" in said
    assert (tmp_path / "runs" / "it's $HOME" / "metrics.jsonl").exists()


def test_workers_that_do_not_come_are_counted(head, tmp_path: Path) -> None:
    head.add_node(num_cpus=1)
    run = entrypoint(head.address, tmp_path, 5)
    said, _ = run.communicate(timeout=60)
    assert run.returncode not in (0, 2), said
    assert "1 of 2 nodes joined within 5 s" in said and "--wait-s" in said
