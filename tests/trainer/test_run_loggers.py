"""What a run writes down: each step once, with all its digits, whatever was killed."""

import json
import logging
import math
import multiprocessing
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.job import Job
from trainer.loggers import Background, JsonLines, Record, TensorBoard, read_lines
from trainer.options import LoggerOptions, RunOptions
from trainer.plot import draw_loss, smoothed
from trainer.run import RunFolder


def make_job(root: Path) -> Job:
    return Job(run=RunOptions(root=str(root), name="run"), logger=LoggerOptions(tensorboard=False, plot=False))


def opened(root: Path, step: int | None = None) -> RunFolder:
    folder = RunFolder(make_job(root))
    folder.prepare()
    if step is not None:
        folder.truncate(step)
    return folder


def write_steps(folder: RunFolder, first: int, stop: int, loss: float = 1.0) -> None:
    for step in range(first, stop):
        folder.log_step({"step": step, "loss": loss})


def die_while_logging(root: Path) -> None:
    folder = opened(root)
    write_steps(folder, 0, 8)
    os.kill(os.getpid(), signal.SIGKILL)


def metrics(root: Path) -> list[Record]:
    return read_lines(root / "run" / "metrics.jsonl")


def test_losses_keep_all_their_digits(tmp_path: Path) -> None:
    losses = [0.1 + 0.2, 1 / 3, 5e-324, 2.0]
    folder = opened(tmp_path)
    for step, loss in enumerate(losses):
        folder.log_step({"step": step, "loss": loss})
    assert [record["loss"] for record in metrics(tmp_path)] == losses


def test_what_is_not_finite_is_still_json(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.log_step({"step": 0, "loss": math.nan, "grad_norm": -math.inf, "mfu": None})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert math.isnan(float(record["loss"])) and float(record["grad_norm"]) == -math.inf and record["mfu"] is None


def test_on_resume_each_step_stands_once(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write_steps(folder, 0, 8, loss=1.0)
    folder.close()
    folder = opened(tmp_path, step=5)
    write_steps(folder, 5, 10, loss=2.0)
    folder.close()
    assert [(record["step"], record["loss"]) for record in metrics(tmp_path)] == [
        (step, 1.0 if step < 5 else 2.0) for step in range(10)
    ]


def test_a_validation_at_the_checkpoint_is_kept_and_a_later_one_is_not(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in (0, 4, 8):
        folder.log_eval({"step": step, "valid_loss": 1.0})
    folder.close()
    opened(tmp_path, step=4).close()
    assert [record["step"] for record in read_lines(tmp_path / "run" / "evals.jsonl")] == [0, 4]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die_while_logging, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(metrics(tmp_path)) == 8, "lines are in the file at once"
    folder = opened(tmp_path)
    folder.log_eval({"step": 0, "valid_loss": 1.0})
    write_steps(folder, 0, 2)
    folder.close()
    assert [record["step"] for record in metrics(tmp_path)] == [0, 1]
    assert len(read_lines(tmp_path / "run" / "evals.jsonl")) == 1


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write_steps(folder, 0, 3)
    folder.close()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    folder = opened(tmp_path, step=3)
    write_steps(folder, 3, 5)
    folder.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_steps_that_never_reached_the_disk_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = opened(tmp_path)
    write_steps(folder, 0, 3)
    folder.close()
    opened(tmp_path, step=5).close()
    assert "lacks 2 of the 5 steps done" in caplog.text


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines.append({"step": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (18, hard))  # the second line fits in part
    try:
        lines.append({"step": 1})
        lines.append({"step": 2})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    lines.append({"step": 3})
    lines.close()
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert caplog.text.count("cannot be written") == 1


def test_lines_that_are_lost_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(Path("/dev/full"))
    lines.append({"step": 0})
    lines.append({"step": 1})
    lines.close()
    assert "/dev/full lacks its last 2 lines: [Errno 28]" in caplog.text


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, stop in ((0, 6), (4, 8)):
        board = TensorBoard(tmp_path, first_step)
        for step in range(first_step, stop):
            board.write("train", step, {"step": step, "loss": float(first_step), "mfu": None})
        board.close()
    found = event_accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (step, 0.0 if step < 4 else 4.0) for step in range(8)
    ]


def test_background_work_that_fails_is_given_up_aloud_and_once(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    background = Background()
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            background.do("division", lambda number: number // 0, number)
            background.do("list", done.append, number)
        background.close()
    assert done == [0, 1, 2]
    assert caplog.text.count("division is given up for this run: ZeroDivisionError") == 1


def test_the_loss_is_drawn_at_each_validation(tmp_path: Path) -> None:
    job = replace(make_job(tmp_path), logger=LoggerOptions(tensorboard=False, plot=True))
    folder = RunFolder(job)
    folder.prepare()
    write_steps(folder, 0, 50)
    folder.log_eval({"step": 50, "valid_loss": 1.1})
    folder.close()
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 5.5}\n')
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "evals.jsonl", tmp_path / "loss.png", "run")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_smoothing_keeps_a_straight_line_and_calms_noise() -> None:
    line = [float(i) for i in range(200)]
    assert smoothed(line)[10:190] == pytest.approx(line[10:190])
    assert max(map(abs, smoothed([(-1.0) ** i for i in range(200)]))) < 0.5
