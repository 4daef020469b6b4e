"""Persisted checkpoints: state saved by N ranks, read by any M.

The names are imported on first use, so that reading the options does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoint.errors import CheckpointDamaged, CheckpointError, CheckpointWriteError
    from checkpoint.options import CheckpointOptions
    from checkpoint.persisted.reader import CheckpointReader
    from checkpoint.persisted.store import Checkpoints
    from checkpoint.rng import rng_state, set_rng_state

_HOMES = {
    "CheckpointDamaged": "errors",
    "CheckpointError": "errors",
    "CheckpointOptions": "options",
    "CheckpointReader": "persisted.reader",
    "CheckpointWriteError": "errors",
    "Checkpoints": "persisted.store",
    "rng_state": "rng",
    "set_rng_state": "rng",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"checkpoint.{_HOMES[name]}"), name)
