"""A job: everything that decides what is trained and how, as plain data.

The driver builds it (from Hydra or by hand), checks it, and sends it to the workers as it is.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from checkpoint.options import CheckpointOptions
from offload.options import OffloadOptions
from parallel.options import OptimizerOptions, ParallelOptions
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, ModelOptions, RunOptions, TrainOptions

ENGINES = ("native", "fsdp2", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a rank has to know to train: plain data. ValueError for an engine that is not there, or a
    number that is none."""

    engine: str = "native"
    """``native``, or the same job on ``fsdp2`` or ``deepspeed``, to compare with or to move over from."""
    model: ModelOptions = field(default_factory=LlamaOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    offload: OffloadOptions = field(default_factory=OffloadOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logger: LoggerOptions = field(default_factory=LoggerOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}: choose one of {', '.join(ENGINES)}")
        _check_finite(self)

    @property
    def run_name(self) -> str:
        return self.run.name or f"{self.model.name}-{self.data.name}"

    def micro_batches(self, world: int) -> tuple[int, int]:
        """Sequences in a micro-batch, and micro-batches a step on each rank; ValueError where they do not divide."""
        size, sharing = self.train.global_batch_size, self.parallel.sequence_ranks
        if size % (world // sharing):
            share = f" over parallel.sequence={self.parallel.sequence} of {sharing}" if sharing > 1 else ""
            raise ValueError(
                f"train.global_batch_size={size} must be divisible by the workers, launch.workers={world}{share}"
            )
        world //= sharing
        micro = self.train.micro_batch_size or size // world
        if size // world % micro:
            raise ValueError(
                f"train.global_batch_size={size} over launch.workers={world} is {size // world} sequences a worker, "
                f"which must be divisible by train.micro_batch_size={micro}"
            )
        return micro, size // world // micro


def _check_finite(options: Any, prefix: str = "") -> None:
    """ValueError for a NaN, which passes every comparison of the groups' own checks, or an infinity, in any of them."""
    for item in fields(options):
        name, value = f"{prefix}{item.name}", getattr(options, item.name)
        if is_dataclass(value):
            _check_finite(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value}: must be a finite number")
