"""What the update of the owned ranges needs beside `torch.optim`."""

import pytest
import torch

from parallel.optimizer import NORM_ROW, sum_of_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, NORM_ROW, 100_003, 3_000_000])
def test_the_sum_of_squares_equals_double_precision_whatever_its_length(numel: int, dtype: torch.dtype) -> None:
    """Or the norm, and with it a clipped step, would hang on how many ranks share a gradient."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.double().square().sum().item()
    assert sum_of_squares(values).item() == pytest.approx(expected, rel=5e-7)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, -1])
def test_one_bad_element_shows(bad: float, place: int) -> None:
    values = torch.ones(3 * NORM_ROW + 7)
    values[place] = bad
    assert not sum_of_squares(values).isfinite()
