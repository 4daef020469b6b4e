"""State saved by N ranks, over gloo, is read by any M; the failure of one rank is a failure of all."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from checkpoint import CheckpointOptions, Checkpoints

_SCRIPT = Path(__file__).with_name("rank_process.py")


@pytest.fixture(scope="module")
def ranks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rank_process", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """URL and outputs of 3 ranks that saved steps 10, 20 and 40; rank 1 could not write step 30."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [str(folder), str(folder / "checkpoints")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(_SCRIPT), "save_fail_and_recover", str(rank), "3", *arguments],
            env=os.environ | {"PYTHONPATH": str(_SCRIPT.parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    return arguments[1], outputs


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [20, 40])
def test_saved_by_3_read_by_any(run: tuple[str, list[str]], ranks: ModuleType, readers: int, step: int):
    reader = Checkpoints(run[0], CheckpointOptions()).open(step)
    for kind in ("master", "exp_avg"):
        expected = ranks.tensor(kind, step).flatten()
        cuts = [len(expected) * i // readers for i in range(readers + 1)]
        parts = [reader.read("w", kind, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), expected)


def test_each_rank_has_its_own_state_and_rank_0_describes(run: tuple[str, list[str]]):
    reader = Checkpoints(run[0], CheckpointOptions()).open(10)
    assert reader.world == 3
    assert [reader.rank_state(rank) for rank in range(3)] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert reader.meta == {"written_by": 0}
    reader.verify()


def test_the_failure_of_one_rank_is_reported_once(run: tuple[str, list[str]]):
    _, (first, *others) = run
    assert first.count("was not written") == 1
    assert "rank 1: " in first and "File too large" in first and "last good checkpoint is that of step 20" in first
    assert not any("was not written" in output for output in others)


def test_a_failed_save_leaves_nothing_behind(run: tuple[str, list[str]]):
    names = sorted(path.name for path in Path(run[0]).iterdir())
    assert names == ["step-00000010", "step-00000020", "step-00000040"]
