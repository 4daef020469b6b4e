"""The permutation behind the order of samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import permuted, shuffled


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**6))
def test_every_sequence_is_visited_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(size), size, seed, epoch)) == list(range(size))


def test_a_large_corpus_is_permuted_without_holding_the_permutation() -> None:
    size = 10**12
    images = permuted(np.arange(size - 10_000, size), size, 0, 0)
    assert len(set(images)) == 10_000 and images.min() >= 0 and images.max() < size
    assert abs(images.mean() / size - 0.5) < 0.02


def test_any_part_is_computed_alone() -> None:
    whole = shuffled(np.arange(300), 97, seed=5)
    parts = [shuffled(np.arange(first, min(first + 7, 300)), 97, seed=5) for first in range(0, 300, 7)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(permuted(np.arange(1000), 1000, seed, epoch)) for seed in (0, 1, 2**32) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)


def test_neighbours_are_not_kept_together() -> None:
    images = permuted(np.arange(100_000), 100_000, 0, 0)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), images)[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(images)) == 1) < 1e-3  # about 2e-5 by chance


@pytest.mark.parametrize("size", [2, 3, 5, 16])
def test_each_sequence_is_equally_likely_at_each_position(size: int) -> None:
    """Chi-squared over epochs: (size - 1)**2 degrees of freedom, at six standard deviations."""
    epochs, counts = 500, np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permuted(np.arange(size), size, 0, epoch)] += 1
    expected, freedom = epochs / size, (size - 1) ** 2
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < freedom + 6 * np.sqrt(2 * freedom)


def test_the_order_never_changes_between_versions() -> None:
    """A checkpoint resumes by index: a change of this order would change the data of every running job."""
    assert permuted(np.arange(10), 10, 0, 0).tolist() == [0, 3, 7, 1, 5, 9, 8, 2, 6, 4]
    assert permuted(np.arange(5), 10**6, 7, 3).tolist() == [399603, 891078, 747332, 492737, 567106]
