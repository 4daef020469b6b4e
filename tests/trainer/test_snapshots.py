"""A run whose worker breaks goes on from memory, wherever its states lie; without a snapshot process, from storage."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.options import CheckpointOptions
from checkpoint.snapshots.process import find_process
from checkpoint.snapshots.recovery import inventories
from checkpoint.snapshots.roster import Roster
from offload.options import OffloadOptions
from parallel.options import OptimizerOptions
from trainer.job import Job
from trainer.loop import Trainer
from trainer.options import LlamaOptions, LoggerOptions, RunOptions, TrainOptions
from trainer.run import run_id

STEPS, BROKEN_AFTER = 9, 6
PLACES = {
    "memory": OffloadOptions(),
    "host": OffloadOptions(states="host", weights="host"),
    "speculated": OffloadOptions(states="host", update="speculate", speculate_share=1.0),
    "weights first": OffloadOptions(states="host", weights="host", update="weights_first"),
    "part": OffloadOptions(states="host", gpu_bytes=12 * 30_000),
}


class Broken(Exception):
    pass


def job(root: Path, name: str, place: str, every: str = "1") -> Job:
    return Job(
        model=LlamaOptions(name="small", dim=32, ffn_dim=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16),
        train=TrainOptions(
            steps=STEPS, seq_len=32, global_batch_size=4, eval_every_steps=0, eval_sequences=4, sample_tokens=0,
            # Clips some steps: speculation is wrong there.
            clip_norm=0.5,
        ),  # fmt: skip
        optimizer=OptimizerOptions(lr=1e-2),
        offload=PLACES[place],
        checkpoint=CheckpointOptions(every_steps=4, snapshot_every_steps=every, snapshot_hold_s=60),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(root), name=name),
    )  # fmt: skip


def train(job: Job, *, break_after: int = STEPS) -> tuple[dict[int, float], list[str]]:
    """Losses by step, and what was said; the worker breaks once the losses of `break_after` steps are known and what
    was due before is on storage."""
    losses: dict[int, float] = {}
    said: list[str] = []

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "step":
            losses[event["step"]] = event["loss"]
            if len(losses) == break_after < STEPS:
                trainer.checkpoints.wait()
                raise Broken
        elif event["type"] in ("message", "resumed"):
            said.append(event["text"])

    trainer = Trainer(job, emit=emit)
    try:
        trainer.train()
    except Broken:
        assert not losses.keys() - set(range(break_after))
    return losses, said


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=() if place in ("speculated", "weights first") else pytest.mark.slow)
        for place in PLACES
    ],
)
def test_a_broken_run_goes_on_from_memory_to_the_last_bit(tmp_path: Path, place: str):
    torch.set_num_threads(1)
    whole, _ = train(job(tmp_path, "whole", place))
    assert sorted(whole) == list(range(STEPS))
    first, _ = train(job(tmp_path, "broken", place), break_after=BROKEN_AFTER)
    rest, said = train(job(tmp_path, "broken", place))
    assert any("of the snapshots in memory" in text for text in said), said
    assert min(rest) in (BROKEN_AFTER - 1, BROKEN_AFTER), rest  # the last snapshot may not have been committed
    assert first | rest == whole


@pytest.mark.parametrize(("place", "every"), [("host", "1"), ("host", "4"), ("part", "1")])
def test_states_in_host_memory_are_updated_into_the_snapshot(tmp_path: Path, place: str, every: str):
    """And so nothing of them is copied, and every loss is that of a run without snapshots."""
    torch.set_num_threads(1)
    plain, _ = train(job(tmp_path, "plain", place, every="0"))
    trained = job(tmp_path, "run", place, every=every)
    losses: dict[int, float] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "step":
            losses[event["step"]] = event["loss"]
        assert event["type"] != "message" or "snapshot" not in event["text"], event["text"]

    trainer = Trainer(trained, emit=emit)
    trainer.train()
    assert losses == plain
    stats, states = trainer.snapshots.stats, trainer.engine.state_bytes()
    resident = 0 if place == "host" else 12 * 30_000
    assert stats.taken == STEPS // int(every) and stats.state_bytes >= states["master"] + states["optimizer"]
    assert stats.copied_bytes <= resident and (stats.copied_bytes > 0) == (resident > 0)


def test_without_the_snapshot_process_it_goes_on_from_storage(tmp_path: Path):
    torch.set_num_threads(1)
    broken = job(tmp_path, "broken", "memory")
    whole, _ = train(job(tmp_path, "whole", "memory"))
    first, _ = train(broken, break_after=BROKEN_AFTER)
    found = find_process(run_id(broken), "local")
    assert found is not None
    roster = Roster(run=run_id(broken), token=found[1], nodes=(found[0],), rank_nodes=(0,))
    os.kill(inventories(roster)["local"]["pid"], signal.SIGKILL)
    rest, said = train(broken)
    assert any("resumed from step 4 of " in text and "checkpoints" in text for text in said), said
    assert first | rest == whole and min(rest) == 4
