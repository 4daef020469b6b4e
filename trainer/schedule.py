"""The learning rate of each step.

A pure function of the step, so there is nothing to save and a resumed run has the rates of an uninterrupted one. Steps
are counted from 0.
"""

import math

from parallel.options import OptimizerOptions


def learning_rate(options: OptimizerOptions, step: int, total_steps: int) -> float:
    """The rate of `step`: linear warm-up, then the decay of ``options.schedule``.

    Step ``i`` of a warm-up of ``w`` steps gets ``lr * (i + 1) / w``: the first is above 0, the last is ``lr``. The
    decay starts from ``lr`` at step ``w`` and reaches ``final_lr_ratio * lr`` at step ``total_steps - 1``; ``constant``
    stays at ``lr``. Where the warm-up outlasts the run there is no decay.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    decay_steps = total_steps - 1 - options.warmup_steps
    done = (step - options.warmup_steps) / decay_steps if decay_steps else 0.0
    return options.lr * (options.final_lr_ratio + (1 - options.final_lr_ratio) * _left(options.schedule, done))


def _left(schedule: str, done: float) -> float:
    """How much of the decay is still to come, from 1 to 0, when the fraction `done` of its steps has passed."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - done if schedule == "linear" else 1.0
