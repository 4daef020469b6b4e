"""Bad numbers: back to the newest version and on with other data, on one worker and on two."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.checks import Crew, check
from launch.config import Config
from tests.launch.supervised import SNAPSHOTS, STEPS, Run, running, undisturbed
from trainer.options import RunOptions, TrainOptions

SPIKES = [29, 48]
"""Batches of the text below whose loss is some 2 nats, where the others' is 0.7."""
CHECKPOINTS = ("checkpoint.every_steps=10", "checkpoint.keep_last=20")


@pytest.fixture
def spiky(tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides: a text of two letters, and noise in one place; a loss 1.5 times the others is bad."""
    draw = random.Random(0)
    two_letters = ["".join(draw.choices("ab", k=50_000))] * 2
    (tmp_path / "text.txt").write_text("".join(chr(draw.randrange(33, 126)) for _ in range(400)).join(two_letters))

    def overrides(*more: str, policy: str = "rewind") -> list[str]:
        data = ["data=text", f"data.paths=[{tmp_path / 'text.txt'}]", f"data.cache_dir={tmp_path}"]
        data += ["data.valid_fraction=0", "train.eval_sequences=0", "optimizer.lr=0.02", "train.loss_spike=1.5"]
        return [*data, f"train.on_bad_numbers={policy}", *more]

    return overrides


def went_back(run: Run) -> list[tuple[int, int | None, str | None]]:
    """From which step to which, and to what."""
    assert all(failure.cause == "numbers" and failure.steps_lost is not None for failure in run.failures), run.failures
    return [(failure.step, failure.resumed_step, failure.restored_from) for failure in run.failures]


@pytest.mark.slow
def test_one_worker_goes_back_to_its_checkpoint_and_does_so_again(tmp_path: Path, spiky) -> None:
    command = spiky("launch.workers=1", *CHECKPOINTS)
    with running(tmp_path, *command) as run:
        assert run.end() == 0, run.said
        # step 20 goes on with batch 30, so batch 48 is that of step 38
        assert went_back(run) == [(29, 20, "storage"), (38, 30, "storage")]
        whole = run.losses
        assert sorted(whole) == list(range(STEPS)) and max(list(whole.values())[20:]) < 1, whole
        assert "bad numbers" in run.said and "in all: 17 steps lost" in run.said
    # from after both: no batch is taken up again; from before them: the same choices
    for back, failures in (("40", 2), ("10", 4)):
        with running(tmp_path, *command, f"run.resume={back}") as again:
            assert again.end() == 0, again.said
            assert (again.losses, len(again.failures)) == (whole, failures)


def exact_without_the_bad_batches(tmp_path: Path, world: int, overrides: list[str], bad: list[str]) -> None:
    """Where every step has a snapshot, all that is lost is the bad batch: the losses are those of ``skip``."""
    with undisturbed(world, tmp_path, *bad) as expected, running(tmp_path, *overrides) as run:
        assert run.end() == 0, run.said
        assert went_back(run) == [(batch - passed, batch - passed, "memory") for passed, batch in enumerate(SPIKES)]
        skipped = expected()
        good = [skipped[batch] for batch in range(STEPS + len(SPIKES)) if batch not in SPIKES]
        assert list(run.losses.values()) == good
        assert not (run.folder / "team.json").exists()


@pytest.mark.slow
def test_one_worker_goes_back_to_its_snapshot(tmp_path: Path, spiky) -> None:
    skip = spiky(f"train.steps={STEPS + len(SPIKES)}", policy="skip")
    exact_without_the_bad_batches(tmp_path, 1, spiky("launch.workers=1", SNAPSHOTS), skip)


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_all_ranks_go_back_alike_and_keep_their_processes(tmp_path: Path, spiky) -> None:
    skip = spiky(f"train.steps={STEPS + len(SPIKES)}", policy="skip")
    exact_without_the_bad_batches(tmp_path, 2, spiky("launch.workers=2", SNAPSHOTS), skip)


@pytest.mark.slow
def test_before_the_first_version_it_begins_anew_with_other_data(tmp_path: Path, spiky) -> None:
    with running(tmp_path, *spiky("launch.workers=1", "checkpoint.every_steps=35", "train.steps=40")) as run:
        assert run.end() == 0, run.said
        assert went_back(run) == [(29, 0, "start")]
        assert sorted(run.losses) == list(range(40))


@pytest.mark.slow
def test_a_spent_budget_ends_the_job_with_its_reason(tmp_path: Path, spiky) -> None:
    with running(tmp_path, *spiky("launch.workers=1", "train.rewinds=1", *CHECKPOINTS)) as run:
        assert run.end() == 1
        assert "step 38 is bad: its loss" in run.said and "not recovered from: train.rewinds=1 is used up" in run.said
        assert [failure.resumed_step for failure in run.failures] == [20, None]


def test_it_needs_something_to_go_back_to(tmp_path: Path) -> None:
    config = Config(train=TrainOptions(on_bad_numbers="rewind"), run=RunOptions(root=str(tmp_path)))
    with pytest.raises(ValueError, match="set checkpoint.snapshot_every_steps or checkpoint.every_steps"):
        check(config, Crew(1, 1, "cpu"))
