"""Bad steps: judged alike before and after a resume, skipped without a trace, or the end of the run."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.options import CheckpointOptions
from launch.checks import Crew, check
from launch.config import Config
from parallel.options import OptimizerOptions, ParallelOptions
from trainer.job import Job
from trainer.loop import Trainer
from trainer.numbers import FEWEST_STEPS, MOST_IN_A_ROW, BadNumbers, Judge, Rewind
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions
from trainer.run import LeftBehind
from trainer.running import Running


def test_what_is_bad() -> None:
    judge = Judge(TrainOptions(on_bad_numbers="skip", loss_spike=3.0))
    assert "loss is nan" in judge.fault(math.nan, 1.0)
    assert "norm is inf" in judge.fault(1.0, math.inf)
    assert not judge.fault(100.0, 1.0)  # nothing to compare it with yet
    for _ in range(FEWEST_STEPS):
        assert not judge.fault(1.0, 1.0)
    assert "over train.loss_spike=3 times the median" in judge.fault(3.1, 1.0)
    assert not judge.fault(2.9, 1.0)


def test_a_history_that_was_kept_judges_alike() -> None:
    before = Judge(TrainOptions(loss_spike=2.0))
    for loss in (1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.3, 1.0, math.nan):
        before.fault(loss, 1.0)
    after = Judge(TrainOptions(loss_spike=2.0))
    after.load(**json.loads(json.dumps(before.dump())))
    assert before.fault(2.1, 1.0) == after.fault(2.1, 1.0) != ""
    assert before.dump() == after.dump()


def test_too_many_in_a_row_end_the_run() -> None:
    judge = Judge(TrainOptions(on_bad_numbers="skip"))
    for _ in range(MOST_IN_A_ROW):
        assert judge.fault(math.nan, 1.0)
    with pytest.raises(BadNumbers, match="17 steps in a row"):
        judge.fault(math.nan, 1.0)


def test_a_state_without_numbers_is_unfit_unless_its_step_was_skipped() -> None:
    def step(grad_norm: float, fault: str = "") -> str:
        return Running(7, 1e-3, torch.tensor([1.0, 0, 0, grad_norm]), None, fault).unfit()

    assert not step(1.0) and not step(math.nan, "its gradient norm is nan")
    assert step(math.nan) == step(math.inf) == "step 7 left no numbers"


def spiky_job(folder: Path, name: str, **train: object) -> Job:
    """A text of one letter, with noise in one place: some batches have a far higher loss."""
    text = folder / "text.txt"
    if not text.exists():
        noise = random.Random(0)
        letters = "a" * 40_000
        text.write_text(letters + "".join(chr(noise.randrange(33, 126)) for _ in range(600)) + letters)
    options: dict = {"steps": 40, "seq_len": 64, "global_batch_size": 8, "eval_sequences": 0, "sample_tokens": 0}
    return Job(
        model=LlamaOptions(name="tiny", dim=32, ffn_dim=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16),
        data=DataOptions(name="spiky", source="text", paths=[str(text)], valid_fraction=0.0, cache_dir=str(folder)),
        optimizer=OptimizerOptions(lr=1e-2),
        train=TrainOptions(**(options | train)),
        parallel=ParallelOptions(placement="zero3"),
        checkpoint=CheckpointOptions(every_steps=5, keep_last=20),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(folder / "runs"), name=name),
    )


def records(folder: Path, name: str) -> list[dict]:
    keys = ("step", "loss", "skipped")
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: record[key] for key in keys if key in record} for record in map(json.loads, lines)]


def test_a_spike_is_skipped_and_skipped_again_after_a_resume(tmp_path: Path) -> None:
    events: list[dict] = []
    job = spiky_job(tmp_path, "whole", on_bad_numbers="skip", loss_spike=4.0)
    Trainer(job, emit=events.append).train()
    whole = records(tmp_path, "whole")
    skipped = [record["step"] for record in whole if "skipped" in record]
    assert skipped, [record["loss"] for record in whole]
    assert any("is skipped: its loss" in event.get("text", "") for event in events)
    # gone back to before the first one: the same choice, and the same losses to the last bit
    back = (skipped[0] // 5) * 5
    assert back >= 5, skipped
    Trainer(replace(job, run=replace(job.run, resume=str(back))), emit=events.append).train()
    assert records(tmp_path, "whole") == whole


@pytest.mark.slow
def test_a_spike_ends_the_run_where_it_is_not_to_be_skipped(tmp_path: Path) -> None:
    with pytest.raises(BadNumbers, match="train.on_bad_numbers=skip"):
        Trainer(spiky_job(tmp_path, "ended", loss_spike=4.0), emit=lambda event: None).train()


class Late(Trainer):
    """Reports a step while the next one runs, as on a GPU."""

    def _build(self, *args: object) -> None:
        super()._build(*args)
        self._lag = 1


def test_no_version_is_of_a_step_that_was_not_judged(tmp_path: Path) -> None:
    job = spiky_job(tmp_path, "late", on_bad_numbers="rewind", loss_spike=4.0)
    job = replace(job, checkpoint=CheckpointOptions(snapshot_every_steps="1", snapshot_hold_s=60))
    with pytest.raises(Rewind) as bad:
        Late(job, emit=lambda event: None).train()
    good = len(records(tmp_path, "late"))
    assert bad.value.next_batch == good + 1
    events: list[dict] = []
    left_behind = LeftBehind(batches_before=bad.value.next_batch)
    Trainer(job, emit=events.append, left_behind=left_behind).train()
    [resumed] = [event for event in events if event["type"] == "resumed"]
    assert (resumed["from"], resumed["step"]) == ("memory", good)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"engine": "deepspeed", "parallel": ParallelOptions(placement="zero2")}, "engine=native or fsdp2"),
        ({"parallel": ParallelOptions(quantize="all", error_feedback=True)}, "parallel.error_feedback=false"),
    ],
)
def test_what_cannot_be_skipped_is_refused(tmp_path: Path, options: dict, named: str) -> None:
    run, train = RunOptions(root=str(tmp_path)), TrainOptions(on_bad_numbers="skip")
    with pytest.raises(ValueError, match=named):
        check(Config(train=train, run=run, **options), Crew(2, 1, "cpu"))
