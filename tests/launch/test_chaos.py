"""`atoll chaos`: what it refuses, and real faults in a real job, each found, told and recovered from."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.chaos import chaos, parse_plan
from launch.report import show, summarize
from tests.launch.supervised import SNAPSHOTS, Raylets, Run, running, undisturbed


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """The folder of a run whose driver is gone."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {}\n")
    (folder / "run.lock").write_text("")
    team = {"driver_pid": 2**22 + 1, "driver_host": socket.gethostname(), "ranks": [], "nodes": []}
    (folder / "team.json").write_text(json.dumps(team))
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("kill=worker", "is not being trained: start it first"),
        ("kill=worker run.name=jobs", "did you mean job"),
        ("kill=all", "choose one of worker, node, hang, corrupt, disk"),
        ("kill=disk", "say yes=true"),
        ("kill=node rank=1", "rank= is not read with kill=node; node= chooses"),
        ("kill=worker node=1", "node= is not read with kill=worker; rank= chooses"),
        ("kill=worker count=0", "count=0: must be 1 or more"),
        ("kill=worker rank=1.5", "rank=1.5: must be a whole number"),
        ("kill=worker every_s=soon", "every_s=soon: must be a number"),
        ("kil=worker", "did you mean kill="),
    ],
)
def test_what_it_refuses(stale: Path, typed: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        chaos([*typed.split(), f"run.root={stale}"])
    assert not (stale / "job" / "chaos.jsonl").exists()


def test_a_seed_draws_the_same(stale: Path) -> None:
    plans = [parse_plan(["kill=worker", "seed=7", f"run.root={stale}"]) for _ in range(2)]
    assert plans[0].draw.random() == plans[1].draw.random()


def test_the_command_ends_with_2_where_nothing_runs(atoll, stale: Path) -> None:
    done = atoll("chaos", "kill=worker", f"run.root={stale}")
    assert done.returncode == 2 and "is not being trained" in done.stderr
    assert atoll("chaos", "--help").returncode == 0


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    cluster = Raylets(4)
    yield cluster
    cluster.close()


def struck(atoll, run: Run, *words: str) -> dict:
    """One fault; what `chaos.jsonl` has of it."""
    done = atoll("chaos", *words, f"run.root={run.folder.parent}", "run.name=job")
    assert done.returncode == 0, done.stderr
    return json.loads((run.folder / "chaos.jsonl").read_text().splitlines()[-1])


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_fault_waits_for_a_team_that_is_being_made_anew(tmp_path: Path, atoll) -> None:
    with running(tmp_path, "launch.workers=2", SNAPSHOTS, "train.steps=1000000") as run:
        run.wait(lambda: run.steps >= 3)
        struck(atoll, run, "kill=worker", "rank=1", "count=2", "every_s=0")
        faults = [json.loads(line) for line in (run.folder / "chaos.jsonl").read_text().splitlines()]
        assert [fault["rank"] for fault in faults] == [1, 1] and faults[0]["pid"] != faults[1]["pid"]
        run.wait(lambda: len(run.failures) == 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 75, run.said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_kind_is_recovered_from_and_reported(tmp_path: Path, atoll, raylets: Raylets) -> None:
    over = [f"launch.address={raylets.address}", "launch.nodes=3", "launch.workers=3", SNAPSHOTS, "train.steps=100000"]
    over += ["launch.hang_timeout_s=5", "checkpoint.every_steps=10"]
    with undisturbed(3, tmp_path) as expected, running(tmp_path, *over) as run:

        def recovered(count: int, cause: str) -> None:
            run.wait(lambda: len(run.failures) == count)
            assert run.failures[-1].cause == cause, run.failures[-1]
            assert run.failures[-1].restored_from == "memory", run.failures[-1]
            steps = run.steps
            run.wait(lambda: run.steps > steps + 3)

        run.wait(lambda: run.steps >= 12)
        fault = struck(atoll, run, "kill=worker", "rank=1")
        assert fault["rank"] == 1 and "SIGKILL to rank 1" in fault["what"]
        recovered(1, "process")
        pid = run.pids[2]
        assert struck(atoll, run, "kill=hang", "rank=2")["pid"] == pid
        recovered(2, "hang")
        assert "is stopped (SIGSTOP)" in run.failures[-1].what and run.failures[-1].rank == 2
        assert run.failures[-1].found_s < 5 + 20
        assert not os.path.exists(f"/proc/{pid}")
        assert "flipped bit" in struck(atoll, run, "kill=corrupt", "node=0", "seed=3")["what"]
        fault = struck(atoll, run, "kill=node", "node=0")
        assert "which held rank" in fault["what"]
        recovered(3, "node")
        assert "byte" in struck(atoll, run, "kill=disk", "yes=true")["what"]
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 75, run.said
        whole, found = expected(), run.losses
        assert sorted(found) == list(range(len(found)))
        assert all(found[step] == whole[step] for step in whole.keys() & found.keys())
        text = show(summarize(run.folder))
        assert "stopped" in text and "failures 3 (" in text and "), 5 made by atoll chaos" in text, text
        assert "failures 3" in run.said and "recovery" in text
