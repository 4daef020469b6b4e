"""Several workers, on a cluster of our own and on one that is joined: placement, ends, faults."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray

SMALL = (
    "launch.device=cpu model.dim=32 model.num_heads=2 model.ffn_dim=64 model.num_layers=1 train.seq_len=64 "
    "train.eval_sequences=8 train.sample_tokens=0 logger=none"
).split()
ENDLESS = [*SMALL, "launch.workers=2", "train.steps=1000000"]


def left_running(run, patience_s: float = 15) -> list[str]:
    """What is still alive of a run's session, after a little patience: Ray's helpers see its end a moment later."""
    deadline = time.monotonic() + patience_s
    while True:
        alive = [process for process in psutil.process_iter(["pid", "name", "status"]) if _in_session(process, run.pid)]
        if not alive or time.monotonic() > deadline:
            return [process.info["name"] for process in alive]
        time.sleep(0.2)


def _in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE
    except ProcessLookupError:
        return False


@pytest.mark.slow
def test_sigterm_for_every_process_ends_after_the_step(atoll_started) -> None:
    run = atoll_started("train", *ENDLESS)
    assert any(line.startswith("step 1/") for line in run.stdout)
    os.killpg(run.pid, signal.SIGTERM)
    rest = "".join(run.stdout)
    assert run.wait(30) == 75, rest
    assert "the same command resumes" in rest
    assert not left_running(run)


@pytest.mark.slow
def test_all_that_listens_on_one_machine_listens_on_loopback(atoll_started) -> None:
    run = atoll_started("train", *ENDLESS)
    assert any(line.startswith("step 1/") for line in run.stdout)
    found = {}
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        for socket in process.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                found[socket.laddr.ip.removeprefix("::ffff:"), socket.laddr.port] = process.name()
    assert {name.split(".")[0] for name in found.values()} >= {"gcs_server", "raylet", "ray::Bootstrap", "atoll"}
    assert {address for address, _ in found} == {"127.0.0.1"}, found


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named(atoll_started) -> None:
    run = atoll_started("train", *ENDLESS, "launch.max_failures=0")
    assert any(line.startswith("step 1/") for line in run.stdout)
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if p.name().startswith("ray::Bootstrap")]
    assert len(workers) == 2
    victim = workers[1].pid
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    said = "".join(run.stdout)
    assert run.wait(30) == 1
    assert time.monotonic() - began < 20
    assert re.search(rf"^atoll: rank [01] on node \S+: its process \(pid {victim}\) died", said, re.MULTILINE), said
    assert not left_running(run)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


def test_one_worker_on_each_of_two_nodes(atoll, cluster: str, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()  # a folder of the user's presets does not hide the package of that name
    done = atoll("train", *SMALL, "train.steps=3", f"launch.address={cluster}", "launch.workers=2", "launch.nodes=2")
    assert done.returncode == 0, done.stderr
    assert "node 2 x worker 1" in done.stdout
    assert len(list((tmp_path / "runs" / "tiny-stdlib" / "logs").glob("rank-*.log"))) == 2


def test_more_workers_than_the_cluster_has_room_for(atoll, cluster: str) -> None:
    began = time.monotonic()
    done = atoll("train", *SMALL, f"launch.address={cluster}", "launch.workers=8", "launch.nodes=2")
    assert done.returncode == 2
    assert "needs 4 CPUs on each of 2 nodes" in done.stderr and "1 CPUs" in done.stderr
    assert time.monotonic() - began < 20


def test_a_name_that_the_users_folder_takes_on_a_worker(atoll, cluster: str, tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("")
    done = atoll("train", *SMALL, f"launch.address={cluster}", "launch.workers=2", "launch.nodes=2")
    assert done.returncode == 2
    assert "'trainer'" in done.stderr and "on node" in done.stderr and str(tmp_path / "trainer.py") in done.stderr


@pytest.mark.slow
def test_what_only_a_worker_finds_wrong_is_one_line(atoll, cluster: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff" * 1000)
    done = atoll(
        "train",
        *SMALL,
        f"launch.address={cluster}",
        "launch.workers=2",
        "launch.nodes=2",
        "data=text",
        "data.paths=[bad.txt]",
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert re.match(r"atoll: rank [01] on node \S+: .*bad\.txt", line), done.stderr
    trace = (tmp_path / "runs" / "tiny-text" / "logs" / "rank-0.log").read_text()
    assert "Traceback" in trace and "bad.txt" in trace
