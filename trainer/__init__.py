"""Training: the loop, the models, the data and the run's folder. The names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.job import Job
    from trainer.loop import Trainer

_HOMES = {"Job": "job", "Trainer": "loop"}

__all__ = ["Job", "Trainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(import_module(f"trainer.{_HOMES[name]}"), name)
