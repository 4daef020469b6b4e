"""Placements that are tried at the start: the fastest is taken, nothing of the trial stays, a resumed run keeps it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.options import CheckpointOptions
from parallel.options import ParallelOptions
from trainer import trial
from trainer.build import Rank
from trainer.job import Job
from trainer.loop import Trainer
from trainer.options import LlamaOptions, LoggerOptions, RunOptions, TrainOptions
from trainer.trial import FILE, fastest, settle, timed

SMALL = LlamaOptions(dim=32, ffn_dim=64, num_layers=1, num_heads=2, compile=False)
TRAIN = TrainOptions(
    steps=4, seq_len=32, global_batch_size=4, eval_every_steps=0, eval_sequences=4, sample_tokens=0, dtype="fp32"
)
TRIED = ParallelOptions(candidates=["ddp", "zero3"], auto_steps=2, placement="zero1")


def job(root: Path, name: str, parallel: ParallelOptions, steps: int = 4) -> Job:
    return Job(
        model=SMALL, train=replace(TRAIN, steps=steps), parallel=parallel, run=RunOptions(root=str(root), name=name),
        checkpoint=CheckpointOptions(every_steps=2), logger=LoggerOptions(tensorboard=False, plot=False),
    )  # fmt: skip


def trained(job: Job) -> tuple[list[float], list[str]]:
    """The losses, and what was told."""
    events: list[dict] = []
    Trainer(job, emit=events.append).train()
    return (
        [event["loss"] for event in events if event["type"] == "step"],
        [event["text"] for event in events if event["type"] == "message"],
    )


def test_what_was_tried_leaves_no_trace_but_the_choice(tmp_path: Path) -> None:
    losses, said = trained(job(tmp_path, "tried", TRIED))
    kept = json.loads((tmp_path / "tried" / FILE).read_text())
    assert kept["chosen"] in ("ddp", "zero3") and set(kept["step_s"]) == {"ddp", "zero3"}
    assert kept["chosen"] == min(kept["step_s"], key=kept["step_s"].get)
    assert any(f"taken: {kept['chosen']}" in line for line in said)
    plain, _ = trained(job(tmp_path, "plain", ParallelOptions(placement=kept["chosen"])))
    assert losses == plain and len(losses) == 4


STEP_S = 1 / 128


class _Machine:
    """A clock, and a device that is given steps and has done them once they are waited for; all else takes no time."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self._num_done = 0

    def train_step(self, step: int) -> "_Machine":
        self.given.append(step)
        return self

    def wait(self) -> None:
        self._num_done = len(self.given)

    def perf_counter(self) -> float:
        return self._num_done * STEP_S


@pytest.mark.parametrize(("least", "seconds", "count"), [(3, 16 * STEP_S, 16), (30, 16 * STEP_S, 30), (1, 0.0, 1)])
def test_short_steps_are_tried_for_a_while(
    least: int, seconds: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "SECONDS", seconds)
    monkeypatch.setattr(trial, "time", machine := _Machine())
    found = timed(machine.train_step, least, 4, Rank(0, 1, torch.device("cpu")))
    assert machine.given == [step % 4 for step in range(2 + count)]
    assert found == [STEP_S] * (2 if least > 1 else 1)


def rates(**seconds: float):
    """A stopwatch that knows each placement's time, and what it was asked."""
    asked: list[str] = []

    def time_steps(options: ParallelOptions) -> list[float]:
        asked.append(options.placement)
        return [seconds[options.placement]]

    return time_steps, asked


def test_a_resumed_run_keeps_its_placement_and_another_number_of_workers_tries_again(tmp_path: Path) -> None:
    asked_for = job(tmp_path, "run", TRIED)
    here = Rank.current()
    first, asked = rates(ddp=0.2, zero3=0.1)
    assert settle(asked_for, here, tmp_path, first, print).placement == "zero3" and asked == ["ddp", "zero3"]
    second, asked = rates(ddp=0.1, zero3=0.2)
    assert settle(asked_for, here, tmp_path, second, print).placement == "zero3" and asked == []
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text().replace('"workers": 1', '"workers": 2'))
    assert settle(asked_for, here, tmp_path, second, print).placement == "ddp" and asked == ["ddp", "zero3"]


@pytest.mark.parametrize(
    ("trials", "taken", "counts"),
    [
        ({"a": [[1.0, 1.02]], "b": [[1.1, 1.11]]}, "a", (1, 1)),  # apart
        ({"a": [[1.0, 1.04]], "b": [[1.02, 1.03]]}, "a", (1, 1)),  # not worth another
        ({"a": [[0.8, 1.2], [1.3, 1.3]], "b": [[1.1, 1.1]] * 2, "c": [[2.0, 2.0]]}, "b", (3, 3)),
        ({"a": [[0.9, 1.2], [0.9, 0.9]], "b": [[1.1, 1.1], [1.3, 1.3], [1.3, 1.3]]}, "a", (3, 3)),
    ],
)
def test_what_one_trial_cannot_tell_apart_has_another(trials: dict, taken: str, counts: tuple[int, int]) -> None:
    asked: list[str] = []

    def trial(name: str) -> list[float]:
        asked.append(name)
        return trials[name][min(asked.count(name), len(trials[name])) - 1]

    assert fastest(list(trials), trial)[0] == taken
    assert (asked.count("a"), asked.count("b")) == counts
    assert asked.count("c") == ("c" in trials)


def test_a_candidate_says_placement_and_quantization() -> None:
    options = ParallelOptions(candidates=["free:0:1:2+outer", "zero2"], auto_steps=1, weights_block=64)
    free = options.candidate("free:0:1:2+outer")
    assert (free.placement, free.params, free.grads, free.optim) == ("free", 0, 1, 2)
    assert free.quantize == "outer" and free.weights_block == 64 and not free.candidates
    assert options.candidate("zero2").quantize == "none"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"candidates": ["zero2"]}, "parallel.auto_steps steps each"),
        ({"auto_steps": 3}, "parallel.auto_steps=3 has nothing to try"),
        ({"auto_steps": -1, "placement": "auto"}, "parallel.auto_steps=-1"),
        ({"auto_steps": 3, "candidates": ["free:1:2"]}, "parallel.candidates has 'free:1:2'"),
        ({"auto_steps": 3, "candidates": ["auto"]}, "parallel.candidates has 'auto'"),
        ({"auto_steps": 3, "candidates": ["zero5"]}, "parallel.placement='zero5'"),
        ({"auto_steps": 3, "candidates": ["zero2+int8"]}, "parallel.quantize='int8'"),
        ({"auto_steps": 3, "candidates": ["zero2+auto"]}, "parallel.quantize=auto"),
    ],
)
def test_bad_candidates(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("+", r"\+")):
        ParallelOptions(**options)
