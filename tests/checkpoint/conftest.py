"""What the tests of checkpoints share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointOptions, Checkpoints
from offload.state import Piece


@pytest.fixture
def whole() -> Callable[..., Piece]:
    """Make a piece that is a whole parameter."""

    def make(name: str, tensor: torch.Tensor, kind: str = "master") -> Piece:
        flat = tensor.flatten()
        return Piece(name=name, kind=kind, start=0, stop=len(flat), shape=tuple(tensor.shape), tensor=flat)

    return make


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, messages: list[str]) -> Iterator[Checkpoints]:
    """Checkpoints in an empty local folder, in small chunks."""
    checkpoints = Checkpoints(
        str(tmp_path / "checkpoints"), CheckpointOptions(keep_last=2, chunk_bytes=4096), report=messages.append
    )
    yield checkpoints
    checkpoints.close()
