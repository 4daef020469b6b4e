"""`kill -9` of every process of a run at random moments; the same command again; every loss to the last bit."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STEPS = 24
SMALL = (
    "model.dim=64 model.ffn_dim=160 model.num_layers=2 train.seq_len=64 train.global_batch_size=8 "
    f"train.micro_batch_size=2 train.steps={STEPS} checkpoint.every_steps=3 train.eval_every_steps=7 "
    "train.eval_sequences=16 train.sample_tokens=0 logger.tensorboard=false logger.plot=false launch.device=cpu"
).split()
# What a user's machine does between two steps anyway; without it a run is over before it can be killed.
SLOWER = "train.seq_len=256"
FEEDBACK = ("parallel.quantize=all", "parallel.error_feedback=true")
"""What quantization took from the gradients is then state, too."""


def command(root: Path, name: str, *overrides: str) -> list[str]:
    atoll = Path(sys.executable).with_name("atoll")
    return [str(atoll), "train", *SMALL, SLOWER, f"run.root={root}", f"run.name={name}", *overrides]


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_when(started: list[str], metrics: Path, step: int, delay_s: float) -> bool:
    """Start a run and kill all of it `delay_s` after it logged `step`; False where it ended before."""
    run = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 150
    while num_lines(metrics) <= step and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay_s)
    assert time.monotonic() < deadline
    if run.poll() is not None:
        return False
    driver = psutil.Process(run.pid)
    family = [*driver.children(recursive=True), driver]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    run.wait(20)
    return True


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("workers", "kills", "others"),
    [
        pytest.param(1, 5, (), marks=pytest.mark.slow),
        pytest.param(2, 5, (), marks=[pytest.mark.ray, pytest.mark.slow]),
        pytest.param(2, 2, FEEDBACK, marks=[pytest.mark.ray, pytest.mark.slow], id="2-2-error feedback"),
    ],
)
def test_killed_run_goes_on_to_the_last_bit(tmp_path: Path, workers: int, kills: int, others: tuple[str, ...]) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    overrides = (f"launch.workers={workers}", *others)
    subprocess.run(command(tmp_path, "whole", *overrides), check=True, capture_output=True, timeout=120)
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(STEPS))
    again = command(tmp_path, "killed", *overrides)
    killed = 0
    for step in sorted(draw.sample(range(STEPS - 2), kills)):
        killed += kill_when(again, tmp_path / "killed" / "metrics.jsonl", step, draw.random() * 0.2)
    assert killed, f"nothing was killed (seed {seed})"
    subprocess.run(again, check=True, capture_output=True, timeout=120)
    assert losses(tmp_path / "killed") == expected, f"seed {seed}, killed {killed} times"


AWAY = "offload.threads=1 offload.predict=false".split()
SPECULATE = ["offload.weights=host", "offload.update=speculate", "offload.speculate_share=0.7"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("tier", "more", "kills"),
    [
        ("nvme", [*SPECULATE[:2], "offload.speculate_share=1.0", "offload.host_bytes=6000000"], 1),
        ("host", [], 3),
        ("host", ["offload.weights=host", "offload.update=weights_first"], 3),
        ("host", SPECULATE, 3),
        ("nvme", [], 3),
        ("nvme", ["offload.weights=nvme"], 3),
    ],
)
def test_killed_run_with_states_away_goes_on_to_the_last_bit(
    tmp_path: Path, tier: str, more: list[str], kills: int
) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    away = ["launch.workers=1", *AWAY, *more]
    whole = command(tmp_path, "whole", "offload=host", *away[:3])
    subprocess.run(whole, check=True, capture_output=True, timeout=120)
    drives = [f"offload.nvme_path=[{tmp_path}]", "offload.nvme_direct=false"] if tier == "nvme" else []
    again = command(tmp_path, "killed", f"offload={tier}", *away, *drives)
    killed = 0
    for step in sorted(draw.sample(range(STEPS - 2), kills)):
        killed += kill_when(again, tmp_path / "killed" / "metrics.jsonl", step, draw.random() * 0.2)
    assert killed, f"nothing was killed (seed {seed})"
    subprocess.run(again, check=True, capture_output=True, timeout=120)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"seed {seed}, killed {killed} times"
    assert not list(tmp_path.glob("*.state")), "a killed run left its memory on the drive"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(200)
def test_another_number_of_workers_and_placement_goes_on_within_rounding(tmp_path: Path) -> None:
    subprocess.run(command(tmp_path, "whole", "launch.workers=1"), check=True, capture_output=True, timeout=120)
    first = command(tmp_path, "moved", "launch.workers=1")
    assert kill_when(first, tmp_path / "moved" / "metrics.jsonl", STEPS // 2, 0.05)
    second = command(tmp_path, "moved", "launch.workers=2", "parallel=zero1")
    done = subprocess.run(second, check=True, capture_output=True, text=True, timeout=120)
    assert "resumed from step" in done.stdout
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(loss, rel=1e-5) for step, loss in expected.items())
