"""Persisted checkpoints: state saved by N ranks, read by any M."""

from checkpoint.errors import CheckpointDamaged, CheckpointError, CheckpointWriteError
from checkpoint.options import CheckpointOptions
from checkpoint.reader import CheckpointReader
from checkpoint.rng import rng_state, set_rng_state
from checkpoint.store import Checkpoints

__all__ = [
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointOptions",
    "CheckpointReader",
    "CheckpointWriteError",
    "Checkpoints",
    "rng_state",
    "set_rng_state",
]
