"""What `atoll report` makes of a run's folder: shares that add up, over restarts and failures; no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.failures import FILE, FailureRecord
from launch.report import add_up, report, show, summarize
from trainer.timeline import note, read

FAILURE = FailureRecord(
    time=130.0, cause="process", what="its process (pid 7) died; and more", rank=1, node="10.0.0.2", found_s=0.4,
    restored_from="memory", step=3, resumed_step=2, steps_lost=1, recover_s=4.5, world_before=2, world_after=2,
)  # fmt: skip


def step(number: int, at: float, step_s: float = 5.0) -> dict:
    return {"step": number, "loss": 1.0, "step_s": step_s, "time": at}


def write_run(folder: Path) -> None:
    """Killed at 150 after two starts; step 2 was done twice; a failure within the first start."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {}\n")
    note(folder, "start", at=100.0, pid=1)
    note(folder, "train", at=110.0, step=0)
    note(folder, "eval", at=112.0, step=0, seconds=2.0)
    # steps 0 to 2 until 127; a failure, and back to step 2
    note(folder, "lost", at=131.0, steps=1, seconds=5.0, active=127.0)
    note(folder, "train", at=133.0, step=2)
    note(folder, "save", at=139.0, step=3, seconds=1.0)
    # killed at 139; nothing runs until 160
    note(folder, "start", at=160.0, pid=2)
    note(folder, "train", at=168.0, step=3)
    note(folder, "end", at=174.0, status="finished", step=4)
    note(folder, "exit", at=175.0)
    lines = [step(0, 117.0), step(1, 122.0), step(2, 138.0), step(3, 173.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    FAILURE.append(folder / FILE)


def test_the_shares_add_up(tmp_path: Path) -> None:
    write_run(tmp_path / "it")
    metrics = [json.loads(line) for line in (tmp_path / "it" / "metrics.jsonl").read_text().splitlines()]
    shares = add_up(read(tmp_path / "it"), metrics, None)
    assert shares.wall == 75.0
    assert (shares.steps, shares.recomputed, shares.validation, shares.checkpoints) == (20.0, 5.0, 2.0, 1.0)
    assert shares.startup == 10.0 + 8.0
    assert shares.recovery == 133.0 - 127.0
    assert shares.absent == 160.0 - 139.0
    assert shares.goodput == pytest.approx(20 / 75)
    assert shares.rest == pytest.approx(75 - 20 - 5 - 2 - 1 - 18 - 6 - 21)


def test_a_run_that_goes_on_counts_until_now(tmp_path: Path) -> None:
    note(tmp_path, "start", at=100.0)
    note(tmp_path, "train", at=110.0, step=0)
    shares = add_up(read(tmp_path), [step(0, 115.0)], now=120.0)
    assert (shares.wall, shares.startup, shares.steps, shares.absent) == (20.0, 10.0, 5.0, 0.0)


def test_the_text_names_every_failure(tmp_path: Path) -> None:
    write_run(tmp_path / "it")
    text = show(summarize(tmp_path / "it"))
    assert "finished, 4 steps done, 2 starts, 1m 15s since the first" in text
    assert "goodput  26.7%" in text
    assert "not running" in text and "28.0%" in text
    row = next(line for line in text.splitlines() if " process " in line)
    assert "after 0.4s" in row and "memory" in row and "after 4.5s" in row and "rank 1: its process (pid 7) died" in row
    assert "1 steps lost" in text


def test_a_run_is_found_by_its_name(tmp_path: Path) -> None:
    write_run(tmp_path / "it")
    assert report([f"run.root={tmp_path}"]) == report([f"run.root={tmp_path}", "run.name=it"])
    with pytest.raises(ValueError, match="run.name=ti: .*holds it"):
        report([f"run.root={tmp_path}", "run.name=ti"])
    with pytest.raises(ValueError, match="did you mean run.name="):
        report(["run.nam=it"])
    write_run(tmp_path / "other")
    with pytest.raises(ValueError, match="which run.*holds it, other"):
        report([f"run.root={tmp_path}"])


def test_it_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    write_run(tmp_path / "it")
    code = (
        "import sys; from launch.cli import main\n"
        f"try: main(['report', 'run.root={tmp_path}'])\n"
        "finally: assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "goodput" in done.stdout, done.stderr
