import math

import pytest

from parallel.options import OptimizerOptions
from trainer.schedule import learning_rate


def rates(total_steps: int, **options: float | str) -> list[float]:
    chosen = OptimizerOptions(lr=1.0, final_lr_ratio=0.1, **options)  # type: ignore[arg-type]
    return [learning_rate(chosen, step, total_steps) for step in range(total_steps)]


def test_warm_up_is_linear_from_above_zero_to_the_peak() -> None:
    assert rates(100, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_follows_its_closed_form_and_ends_at_the_final_rate() -> None:
    found = rates(111, warmup_steps=10, schedule="cosine")
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(101)]
    assert found[10:] == pytest.approx(expected)
    assert found[60] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1)


def test_linear_falls_by_the_same_amount_each_step() -> None:
    found = rates(101, schedule="linear")
    assert found == pytest.approx([1 - 0.9 * i / 100 for i in range(101)])


def test_constant_stays_at_the_peak() -> None:
    assert rates(10, warmup_steps=2, schedule="constant") == [0.5] + [1.0] * 9


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_of_one_step_trains_at_the_peak(schedule: str) -> None:
    assert rates(1, schedule=schedule) == [1.0]


def test_a_warm_up_longer_than_the_run_never_decays() -> None:
    assert rates(5, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_never_rises_after_the_warm_up(schedule: str) -> None:
    found = rates(57, warmup_steps=7, schedule=schedule)[7:]
    assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False))
