"""Out of memory on the device: who holds most of it, and which overrides would take less.

Owners are counted by whoever they belong to; what no one owns is activations and what kernels work in. What another
override would take is by `trainer.footprint`, which knows no compiler: a compiled block takes less.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from offload.activations.attention_tiles import is_known
from offload.options import ActivationOptions, OffloadOptions
from parallel.engine import Engine
from trainer.build import Rank, choose_dtype
from trainer.footprint import Footprint, alternatives, footprint
from trainer.job import Job
from trainer.memory import owners

log = logging.getLogger(__name__)
ACTIVATIONS = "activations and workspace"
FULL = 0.95
"""Of what is allowed, what an estimate may fill to be called fitting."""
TILE_TOKENS = 8192


def limit_bytes(device: torch.device) -> int | None:
    """What this process may take of a GPU; None on CPU."""
    if device.type == "cpu":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


@contextmanager
def explained(job: Job, where: Rank, engine: Engine, vocab_size: int, step: Callable[[], int]) -> Iterator[None]:
    """Within it ``torch.OutOfMemoryError`` says who holds the memory and what would take less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = report(job, where, engine, vocab_size, step(), str(error))
        raise torch.OutOfMemoryError(text) from error


def report(job: Job, where: Rank, engine: Engine, vocab_size: int, step: int, error: str) -> str:
    """Who holds the device's memory, the largest first, and which overrides would take less.

    error: PyTorch's own words.
    """
    device = where.device
    held, limit = owners(engine, device), limit_bytes(device)
    micro, _ = job.micro_batches(where.world)
    dtype, _ = choose_dtype(job.train.dtype, device)

    def sizes(options: ActivationOptions, micro_batch_size: int) -> Footprint:
        changed = replace(job, offload=replace(job.offload, activations=options))
        return footprint(changed, vocab_size=vocab_size, micro_batch_size=micro_batch_size, dtype=dtype)

    lines = [f"out of memory on rank {where.rank} in step {step}: {error.split('. GPU')[0].splitlines()[0]}"]
    try:
        smaller = _smaller(job, micro, held, sizes, streams=is_known(dtype, device))
        estimate = sizes(job.offload.activations, micro).device_bytes(job.offload.activations)
    except Exception as unknown:  # a model that fake tensors do not run: the owners are worth telling all the same
        log.warning("no estimate of what would fit: %s: %s", type(unknown).__name__, unknown)
        smaller, estimate = {}, 0
    owned = sum(held.values())
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else owned + estimate
    held[ACTIVATIONS] = max(0, most - owned)
    largest = sorted(((size, name) for name, size in held.items() if size), reverse=True)
    lines.append("largest owners: " + ", ".join(f"{name} {gib(size)}" for size, name in largest))
    if limit is not None:
        lines[-1] += f"; {gib(most)} of the {gib(limit)} allowed were in use at once"
    if smaller:
        now = owned + estimate
        lines.append(f"by estimate this takes {gib(now)}; less would take:")
        width = max(map(len, smaller))
        for text, saved in sorted(smaller.items(), key=lambda pair: pair[1]):
            fits = "" if limit is None else ", fits" if now - saved <= FULL * limit else ", not enough by itself"
            lines.append(f"  {text:{width}}  {gib(now - saved)}{fits}")
    return "\n".join(lines)


def _smaller(
    job: Job,
    micro: int,
    held: dict[str, int],
    sizes: Callable[[ActivationOptions, int], Footprint],
    *,
    streams: bool,
) -> dict[str, int]:
    """Overrides that would take less, and how many bytes. streams: whether kernels know the dtype of tiles."""
    options, offload = job.offload.activations, job.offload
    own = sizes(options, micro)
    now, saved = own.device_bytes(options), {}
    for text, other in alternatives(options, streams=streams and own.stream_bytes is not None).items():
        saved[text] = now - own.device_bytes(other)
    if micro > 1:
        half = sizes(options, micro // 2)
        saved[f"train.micro_batch_size={micro // 2}"] = now - half.device_bytes(options)
    tokens = (
        min(TILE_TOKENS, job.train.seq_len * micro // 4) if options.tile_tokens is None else options.tile_tokens // 2
    )
    if tokens and job.engine == "native":
        tiled = replace(options, tile_tokens=tokens)
        with suppress(ValueError):  # a model without plain MLPs
            saved[f"offload.activations.tile_tokens={tokens}"] = now - sizes(tiled, micro).device_bytes(tiled)
    if job.engine == "native" and offload.states == "none":
        saved["offload.states=host"] = held["optimizer states"]
    if job.engine == "native" and offload.weights == "device":
        saved[weights_to_host(offload)] = saved.get("offload.states=host", 0) + held["parameters"]
    return {text: size for text, size in saved.items() if size > 0}


def weights_to_host(options: OffloadOptions) -> str:
    """What to add to `options` for weights in host memory, where states have to be away too."""
    return "offload.states=host offload.weights=host" if options.states == "none" else "offload.weights=host"


def gib(size_bytes: float) -> str:
    """In words."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.2f} MiB"
