"""A pause that is asked for in a validation cuts it short, and who goes on makes it good; all ranks leave the same."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from checkpoint.options import CheckpointOptions
from checkpoint.rng import rng_state
from checkpoint.snapshots import rank as of_rank
from parallel.options import OptimizerOptions, ParallelOptions
from trainer import loop
from trainer.job import Job
from trainer.loop import Trainer
from trainer.options import LlamaOptions, LoggerOptions, RunOptions, TrainOptions

ENDLESS = 1_000_000
"""Sequences to validate on: more than the split has."""


def job(root: Path, eval_sequences: int, eval_every_steps: int = 2) -> Job:
    return Job(
        model=LlamaOptions(name="small", dim=32, ffn_dim=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16),
        train=TrainOptions(
            steps=4, seq_len=32, global_batch_size=4, micro_batch_size=1, sample_tokens=0,
            eval_every_steps=eval_every_steps, eval_sequences=eval_sequences,
        ),  # fmt: skip
        optimizer=OptimizerOptions(lr=1e-2),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(root), name="it"),
    )  # fmt: skip


def paused_in_validation(job: Job, step: int) -> dict[str, Any]:
    """The end of a run that is asked to pause in its validation after `step` steps."""
    trainer = Trainer(job, emit=lambda event: None)

    def ask() -> None:
        while (trainer.pulse.read()[0].doing, trainer.step) != ("evaluation", step):
            time.sleep(0.001)
        trainer.request_pause()

    threading.Thread(target=ask, daemon=True).start()
    return trainer.train()


@pytest.mark.timeout(60)
def test_a_pause_cuts_a_validation_and_it_is_made_good(tmp_path: Path) -> None:
    evals = tmp_path / "it" / "evals.jsonl"

    def validated() -> list[int]:
        return [json.loads(line)["step"] for line in evals.read_text().splitlines()]

    begun = Trainer(job(tmp_path, 4), emit=lambda event: begun.request_pause() if event["type"] == "step" else None)
    assert (begun.train()["step"], validated()) == (2, [0])  # asked after step 0, heard with step 1
    end = paused_in_validation(job(tmp_path, ENDLESS), 2)
    assert (end["status"], end["step"], validated()) == ("paused", 2, [0])
    end = paused_in_validation(job(tmp_path, ENDLESS, eval_every_steps=0), 4)
    assert (end["status"], end["step"], validated()) == ("paused", 4, [0])  # all steps are done, but not all is
    end = Trainer(job(tmp_path, 4), emit=lambda event: None).train()
    assert (end["status"], end["step"], validated()) == ("finished", 4, [0, 4])


class Outgrown(Trainer):
    """Rank 1's random state outgrows the room that its snapshots have: it takes none any more."""

    def _snapshot(self) -> None:
        more = {"more": bytes(1 << 20)} if self.where.rank == 1 else {}
        with patch.object(loop, "rng_state", lambda: rng_state() | more):
            super()._snapshot()


def pause(rank: int, job: Job, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    trainer = Outgrown(job, emit=lambda event: None)
    trainer.request_pause()
    with patch.object(of_rank, "GRANT_S", 2.0):  # so long rank 0 waits for a snapshot that never comes
        end = trainer.train()
    found = end["status"], end["step"], trainer.checkpoints.steps()
    assert found == ("paused", 0, [0]), found
    dist.destroy_process_group()


def test_where_one_rank_has_lost_its_snapshots_all_leave_a_checkpoint(tmp_path: Path) -> None:
    every = CheckpointOptions(snapshot_every_steps="1", snapshot_hold_s=10)
    two = replace(job(tmp_path, 4), checkpoint=every, parallel=ParallelOptions(levels={"worker": 2}))
    ranks = torch.multiprocessing.spawn(pause, (two, tmp_path), nprocs=2, join=False)
    try:
        while not ranks.join():
            pass
    finally:
        for process in ranks.processes:
            process.kill()
