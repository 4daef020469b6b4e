"""What this machine reaches with states away from the device: measured by doing it for a moment, on a few hundred MiB.

All ranks of a machine measure at the same time, as they will train at the same time. Shards have the sizes of the
model's own, so that what each costs beside its bytes counts too; a small model's states stay in caches, as in training.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from offload.adamw import adamw
from offload.arena import Arena
from offload.cost import Rates
from offload.drive import BLOCK
from offload.hostpool import HostPool
from offload.options import OffloadOptions
from offload.placing import Part
from offload.shard import CHUNK, Run, Shard, Terms, host_bytes
from offload.states import AdamW, AwayStates

SAMPLE = 1 << 25
"""Parameters that are updated; more than caches hold."""
LINK_BYTES = 256 << 20
ROUNDS = 3
_ADAMW = AdamW(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def measure(
    parts: Sequence[Part], options: OffloadOptions, *, device: torch.device, threads: int, nvme_bytes: float
) -> Rates:
    """The rates of this rank; the drives' where `options` name any. Takes about a second, and one more for drives.

    nvme_bytes: what this rank may use of the drives.
    Raises ArenaError or DriveError (OSErrors) where memory or drives cannot be had.
    """
    sample = _sample(parts, SAMPLE)
    with HostPool(threads) as pool:
        updates, link = _host_rates(sample, device, pool)
        drive = None
        if options.nvme_path and options.states in ("nvme", "auto"):
            most = min(8 * CHUNK, int(nvme_bytes / 12))
            drive = _drive_rate(_sample(parts, max(BLOCK, most)), options, device, pool)
    cores = len(os.sched_getaffinity(0))
    return Rates(
        **updates,
        into=link[0],
        out=link[1],
        resident=_resident_rate(device),
        drive=drive,
        shared=min(1.0, threads / cores) if device.type == "cpu" else 0.0,
    )


def _sample(parts: Sequence[Part], most: int) -> list[Part]:
    """Of the largest parts, those that are at most so many parameters together, one at least."""
    taken: list[Part] = []
    for part in sorted(parts, key=lambda part: -part.numel):
        numel = min(part.numel, most - sum(p.numel for p in taken))
        if numel < part.numel and taken:
            break
        taken.append(Part(numel=numel, weight_bytes=part.weight_bytes, slot_dtype=part.slot_dtype))
    return taken


def _host_rates(
    parts: Sequence[Part], device: torch.device, pool: HostPool
) -> tuple[dict[str, float], tuple[float, float]]:
    """Parameters/s by the names of `Rates`; bytes/s into the device and out of it."""
    shards = [Shard(numel=p.numel, dtype=p.slot_dtype, on_nvme=False, pingpong=True, stays=True) for p in parts]
    register = device if device.type == "cuda" else None
    with Arena(host_bytes(shards), register=register, pool=pool) as arena:
        arrays = [arena.take_together(shard.numel, shard.dtypes) for shard in shards]

        def update(what: str) -> None:
            for *states, apart, slot in arrays:
                out = (states[3], states[4], states[5]) if what == "pingpong" else None
                adamw(
                    states[0], states[1], states[2], slot, {"states": None, "weights": apart}.get(what, slot), lr=1e-4,
                    beta1=_ADAMW.beta1, beta2=_ADAMW.beta2, eps=_ADAMW.eps, weight_decay=0.0, updates=1, out=out,
                    weight_alone=what == "weights", pool=pool,
                )  # fmt: skip

        numel, ways = sum(shard.numel for shard in shards), ("update", "pingpong", "weights", "states")
        rates = {what: numel / _fastest_s(partial(update, what)) for what in ways}
        memory = max((states[0] for states in arrays), key=lambda tensor: tensor.nbytes).view(torch.uint8)
        return rates, _link_rates(memory[:LINK_BYTES], device)


def _link_rates(host: Tensor, device: torch.device) -> tuple[float, float]:
    """Bytes/s to the device and from it, both at once where it is not the host itself."""
    half = host.nbytes // 2
    if device.type == "cpu":
        near = torch.empty(half, dtype=torch.uint8)
        return half / _fastest_s(lambda: near.copy_(host[:half])), half / _fastest_s(
            lambda: host[half:][:half].copy_(near)
        )
    near = torch.empty(2, half, dtype=torch.uint8, device=device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            near[0].copy_(host[:half], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            host[half:][:half].copy_(near[1], non_blocking=True)
        for stream in streams:
            stream.synchronize()

    rate = half / _fastest_s(both)
    return rate, rate


def _drive_rate(parts: Sequence[Part], options: OffloadOptions, device: torch.device, pool: HostPool) -> float:
    """Bytes/s read and written together while states on the drives are updated."""
    shards = [Shard(numel=p.numel, dtype=p.slot_dtype, on_nvme=True, stays=True) for p in parts]
    states = AwayStates(
        _ADAMW, device=device, pool=pool, nvme_folders=[Path(path) for path in options.nvme_path],
        nvme_direct=options.nvme_direct,
    )  # fmt: skip
    try:
        states.add(shards)
        states.allocate()
        work = [(shard, Terms(1e-4, 1, (Run(0, shard.numel, True),))) for shard in shards]
        for _ in range(2):  # what was never written is read without the drive
            states.update(work, scale=None)
            states.settle()
        return 2 * states.nvme_bytes / states.update_s
    finally:
        states.close()


def _resident_rate(device: torch.device) -> float:
    """Parameters/s of the optimizer on the device."""
    parameter = torch.nn.Parameter(torch.zeros(1 << 22, device=device))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return parameter.numel() / _fastest_s(step)


def _fastest_s(act: Callable[[], object]) -> float:
    """Seconds of `act`, the fastest of several rounds after one that is not counted."""
    taken = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return max(1e-9, min(taken[1:]))
