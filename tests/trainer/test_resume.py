"""A run goes on only from what was saved by the same model and training."""

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.options import CheckpointOptions
from parallel.options import OptimizerOptions
from trainer.job import Job
from trainer.loop import Trainer
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions

MODEL = LlamaOptions(name="tiny", dim=32, ffn_dim=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16)


def job(folder: Path, **more: object) -> Job:
    text = folder / "text.txt"
    text.write_text("a text of some words\n" * 500) if not text.exists() else None
    made = Job(
        model=MODEL,
        data=DataOptions(name="words", source="text", paths=[str(text)], valid_fraction=0.0, cache_dir=str(folder)),
        train=TrainOptions(steps=2, seq_len=32, global_batch_size=2, eval_sequences=0, sample_tokens=0),
        checkpoint=CheckpointOptions(url=str(folder / "saved")),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(folder), name="first"),
    )
    return replace(made, **more)


def train(job: Job) -> list[dict]:
    events: list[dict] = []
    Trainer(job, emit=events.append).train()
    return events


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a run that is finished."""
    train(job(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(MODEL, dim=16), "embed.weight is 256 x 32, where model.. asks for 256 x 16"),
        (replace(MODEL, num_layers=1), r"layers.1\..* is 32.*, where model.. asks for not there"),
        (replace(MODEL, num_layers=3), r"layers.2\..* is not there, where"),
    ],
)
@pytest.mark.parametrize("name", ["first", "second"])
def test_another_model_is_never_filled_with_what_fits(saved: Path, name: str, model: LlamaOptions, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(job(saved, model=model, run=RunOptions(root=str(saved), name=name, on_change="accept")))


def test_checkpoints_of_another_training_are_gone_on_from_only_when_told(saved: Path) -> None:
    other = job(saved, optimizer=OptimizerOptions(lr=1e-5), run=RunOptions(root=str(saved), name="second"))
    with pytest.raises(ValueError, match=r"(?s)other options.*optimizer.lr: 0.0003 -> 1e-05.*checkpoint.url="):
        train(other)
    events = train(replace(other, run=replace(other.run, on_change="accept")))
    assert [event["step"] for event in events if event["type"] == "resumed"] == [2]


def test_the_same_training_in_another_folder_goes_on(saved: Path) -> None:
    events = train(job(saved, run=RunOptions(root=str(saved), name="second")))
    assert [event["step"] for event in events if event["type"] == "resumed"] == [2]


def test_another_optimizer_has_no_moments_to_go_on_with(saved: Path) -> None:
    run = RunOptions(root=str(saved), name="first", on_change="accept")
    sgd = job(saved, run=run, optimizer=OptimizerOptions(name="sgd"))
    with pytest.raises(ValueError, match="is of another optimizer, without the momentum_buffer of optimizer=sgd"):
        train(sgd)
    train(job(saved))  # its config is what it was
    events = train(replace(sgd, optimizer=OptimizerOptions(name="sgd", momentum=0.0)))
    assert [event["step"] for event in events if event["type"] == "resumed"] == [2]


def test_fewer_steps_than_are_done(saved: Path) -> None:
    fewer = TrainOptions(steps=1, seq_len=32, global_batch_size=2, eval_sequences=0, sample_tokens=0)
    with pytest.raises(ValueError, match="train.steps=1: 2 steps of .* are done"):
        train(job(saved, train=fewer, run=RunOptions(root=str(saved), name="first", on_change="accept")))
