"""The newest checkpoint is damaged, and there is nothing in memory: the run goes on from the good one before it."""

from pathlib import Path

import pytest

from tests.launch.supervised import Run, running, undisturbed

EVERY = 10
OPTIONS = (f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=9")


def committed(run: Run) -> list[Path]:
    """Oldest first."""
    return sorted(marker.parent for marker in (run.folder / "checkpoints").glob("*/COMMIT"))


def leave_three(tmp_path: Path, workers: int) -> int:
    """A run that was killed after its third checkpoint, of which one byte is another; the step of that one."""
    with running(tmp_path, *OPTIONS, f"launch.workers={workers}") as run:
        run.wait(lambda: len(committed(run)) >= 3)
    newest = committed(run)[-1]
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return EVERY * len(committed(run))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])])
def test_it_goes_on_from_the_good_one_before(tmp_path: Path, workers: int) -> None:
    damaged = leave_three(tmp_path, workers)
    with undisturbed(workers, tmp_path) as expected, running(tmp_path, *OPTIONS, f"launch.workers={workers}") as run:
        assert run.end() == 0, run.said
        assert f"the checkpoint of step {damaged} is damaged" in run.said
        assert [(each.resumed_step, each.restored_from) for each in run.failures] == [(damaged - EVERY, "storage")]
        assert run.losses == expected()


@pytest.mark.slow
def test_one_that_was_asked_for_is_not_exchanged_for_another(tmp_path: Path) -> None:
    damaged = leave_three(tmp_path, 1)
    with running(tmp_path, *OPTIONS, "launch.workers=1", f"run.resume={damaged}") as run:
        assert run.end() == 1, run.said
        assert f"run.resume={damaged - EVERY}" in run.said
