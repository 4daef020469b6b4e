"""train.deterministic: the same bits in every run."""

from pathlib import Path

import pytest
import torch

from trainer.determinism import deterministic
from trainer.job import Job
from trainer.loop import Trainer
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions

MODEL = LlamaOptions(dim=256, ffn_dim=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64)


def losses(root: Path, steps: int, *, dtype: str, seq_len: int, wanted: bool) -> list[float]:
    job = Job(
        model=MODEL,
        data=DataOptions(valid_fraction=0, cache_dir=str(root.parent / "cache")),
        train=TrainOptions(
            steps=steps, eval_sequences=0, sample_tokens=0, seq_len=seq_len, dtype=dtype, deterministic=wanted
        ),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(root)),
    )
    found: list[float] = []
    Trainer(job, emit=lambda event: found.append(event["loss"]) if event["type"] == "step" else None).train()
    return found


def test_what_is_set_is_as_before_afterwards() -> None:
    with pytest.raises(RuntimeError, match="deterministic"), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))  # which of two stays is not said
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_whole_job_uses_no_other_kernels(tmp_path: Path) -> None:
    found = [losses(tmp_path / str(i), 3, dtype="fp32", seq_len=64, wanted=bool(i)) for i in range(2)]
    assert len(found[0]) == 3 and found[0] == found[1]


@pytest.mark.gpu
def test_two_runs_on_a_gpu_are_the_same(tmp_path: Path) -> None:
    found = [losses(tmp_path / str(i), 30, dtype="bf16", seq_len=1024, wanted=True) for i in range(2)]
    assert len(found[0]) == 30 and found[0] == found[1]
