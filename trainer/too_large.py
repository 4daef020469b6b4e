"""Out of memory before the first step: what weights and states take by count, and which overrides would take less."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from offload.options import OffloadOptions
from parallel.planning.cost import memory
from trainer.build import Rank
from trainer.fit_activations import others_bytes, reckoned
from trainer.job import Job
from trainer.models import build_model
from trainer.out_of_memory import FULL, gib, limit_bytes, weights_to_host

log = logging.getLogger(__name__)


@contextmanager
def explained(job: Job, where: Rank, vocab_size: int, dtype: torch.dtype) -> Iterator[None]:
    """Within it, where the engine is built, ``torch.OutOfMemoryError`` says so. vocab_size: the tokenizer's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = str(error).split(". GPU")[0].splitlines()[0]
        lines = [f"out of memory on rank {where.rank} before the first step: {words}"]
        try:
            lines += _told(job, where, vocab_size, dtype) if job.engine == "native" else []
        except Exception as unknown:  # a model that is not reckoned with
            log.warning("no estimate of what would fit: %s: %s", type(unknown).__name__, unknown)
        raise torch.OutOfMemoryError("\n".join(lines)) from error


def _told(job: Job, where: Rank, vocab_size: int, dtype: torch.dtype) -> list[str]:
    meta, options = torch.device("meta"), job.offload
    model = build_model(job.model, vocab_size=vocab_size, seq_len=job.train.seq_len, dtype=dtype, device=meta)
    work, traffic = reckoned(job, model, where, dtype)
    taken, limit = others_bytes(options, work, traffic), limit_bytes(where.device)
    lines = [f"by count it takes {gib(taken)} without activations"]
    if not options.away:
        sizes = [(size, name) for name, size in memory(work, traffic).items() if size and name != "activations"]
        lines[0] += ": " + ", ".join(f"{name} {gib(size)}" for size, name in sorted(sizes, reverse=True))
    for text, other in _alternatives(job).items():
        if (size := others_bytes(other, work, traffic)) < taken:
            fits = "" if limit is None else ", fits" if size <= FULL * limit else ", not enough by itself"
            lines.append(f"  {text}  {gib(size)}{fits}")
    return lines


def _alternatives(job: Job) -> dict[str, OffloadOptions]:
    options = job.offload
    if job.optimizer.name != "adamw" or options.states == "auto":
        return {}
    states = "host" if options.states == "none" else options.states
    return {
        "offload.states=host": replace(options, states=states),
        weights_to_host(options): replace(options, states=states, weights="host"),
    }
