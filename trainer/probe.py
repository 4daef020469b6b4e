"""How long a block of a model takes, and what it keeps: read from the same model with one and with two blocks.

Nothing of the job is touched: the probe has random weights, random tokens and no optimizer states, is one rank alone,
and leaves the random numbers as they were. What it compiles, the model's blocks need not compile again.
"""

import gc
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from offload.options import ActivationOptions, OffloadOptions
from parallel.options import OptimizerOptions, ParallelOptions
from trainer.build import Rank, build_engine
from trainer.job import Job
from trainer.models import build_model
from trainer.models.attention import attention_backends
from trainer.options import HFOptions, LlamaOptions, ModelOptions

WARM_UP, ROUNDS = 2, 5


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Of one micro-batch on this device. Bytes are None on a CPU, which does not say what it holds."""

    block_forward_s: float
    block_backward_s: float
    """Recomputation included."""
    rest_forward_s: float
    """Of all but the blocks: the embedding, the head and its loss."""
    rest_backward_s: float
    block_bytes: float | None
    """What a block adds to a micro-batch's peak of memory, without weights, gradients and states."""
    rest_bytes: float | None


def probe(job: Job, *, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Probed:
    """Run a micro-batch through the job's model cut to one and to two blocks.

    ValueError for a model that cannot be cut; torch.OutOfMemoryError where not even that fits.
    """
    micro = job.train.micro_batch_size or job.train.global_batch_size
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        one, two = (_run(job, num, micro, vocab_size, dtype, device) for num in (1, 2))
    slope, rest = [], []
    for small, large in zip(one, two, strict=True):
        slope.append(max(0.0, large - small))
        rest.append(max(0.0, small - slope[-1]))
    known = device.type == "cuda"
    return Probed(
        block_forward_s=slope[0], block_backward_s=slope[1], rest_forward_s=rest[0], rest_backward_s=rest[1],
        block_bytes=slope[2] if known else None, rest_bytes=rest[2] if known else None,
    )  # fmt: skip


def cut(options: ModelOptions, num_blocks: int) -> ModelOptions:
    """The same model with fewer blocks and random weights."""
    if isinstance(options, LlamaOptions):
        return replace(options, num_layers=num_blocks)
    if isinstance(options, HFOptions):
        overrides = options.overrides | {"num_hidden_layers": str(num_blocks)}
        return replace(options, from_scratch=True, overrides=overrides)
    raise ValueError(f"a model by {type(options).__name__} cannot be cut to fewer blocks")


def _run(
    job: Job, num_blocks: int, micro: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float, float]:
    """Seconds forward and backward, and bytes at the peak beside weights, gradients and states."""
    mode = job.offload.activations.mode
    if mode in ("swap", "auto"):  # which blocks swap how much depends on how many there are
        mode = "recompute"
    alone = replace(
        job,
        model=cut(job.model, num_blocks),
        optimizer=OptimizerOptions(name="sgd", momentum=0.0),
        parallel=ParallelOptions(),
        offload=OffloadOptions(activations=ActivationOptions(mode=mode)),
    )
    seq_len = job.train.seq_len
    model = build_model(alone.model, vocab_size=vocab_size, seq_len=seq_len, dtype=dtype, device=device)
    clock = _Clock(device)
    engine = build_engine(alone, model, Rank(0, 1, device), dtype, say=lambda _: None)
    model.register_forward_hook(lambda *_: clock.mark())
    rows = torch.randint(0, vocab_size, (micro, seq_len + 1), device=device)
    times: list[tuple[float, float]] = []
    with attention_backends(device):
        for _ in range(WARM_UP + ROUNDS):
            clock.start()
            engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1.0, first=True, last=True)
            times.append(clock.stop())
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            engine.step(0.0, None)
    held = engine.state_bytes()
    held.pop("buffers", None)
    gradients = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    engine.close()
    del engine, model, rows
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    forward, backward = (statistics.median(column) for column in zip(*times[WARM_UP:], strict=True))
    return forward, backward, max(0.0, peak - sum(held.values()) - gradients)


class _Clock:
    """From `start` to `mark` to `stop`, on the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._marks: list[Any] = []

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._marks = []
        self.mark()

    def mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def stop(self) -> tuple[float, float]:
        self.mark()
        if not self._cuda:
            start, middle, end = self._marks
            return middle - start, end - middle
        torch.cuda.synchronize(self._device)
        start, middle, end = self._marks
        return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3
