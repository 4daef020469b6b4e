"""Partitioning: who holds which range of a model's state, and what crosses which link when.

The names are imported on first use, so that reading the options does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.engine import Engine
    from parallel.mesh import Mesh
    from parallel.options import OptimizerOptions, ParallelOptions
    from parallel.placement import Placement
    from parallel.sharded import ShardedModel, shard

_HOMES = {
    "Engine": "engine",
    "Mesh": "mesh",
    "OptimizerOptions": "options",
    "ParallelOptions": "options",
    "Placement": "placement",
    "ShardedModel": "sharded",
    "shard": "sharded",
}

__all__ = ["Engine", "Mesh", "OptimizerOptions", "ParallelOptions", "Placement", "ShardedModel", "shard"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'parallel' has no attribute {name!r}")
    return getattr(import_module(f"parallel.{_HOMES[name]}"), name)
