"""Which states lie where: the rule that the engine follows, so that a plan made before knows what it will do.

The units that run first get the fastest memory: the next forward asks for their new weights first. `Part` is one flat
buffer as offloading sees it, in the order in which they run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.options import OffloadOptions
from offload.shard import Shard, host_bytes, outgoing_bytes

SLOT_APART = (
    "offload.weights=nvme: a rank must keep the weights of those parameters alone whose states it has, and not "
    "quantized; set parallel=zero3, hsdp or ddp, and quantize gradients alone, or choose offload.weights=host"
)
NOT_SPECULATED = (
    "offload.update=speculate: nothing is speculated on, as states are on drives, weights are packed after their "
    "update (parallel.quantize), or offload.speculate_share is less than a unit"
)
NOT_WEIGHTS_FIRST = (
    "offload.update=weights_first: all is updated just in time, as no states are away, or weights are packed after "
    "their update (parallel.quantize)"
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank has of a flat buffer."""

    numel: int
    """Parameters whose states it has."""
    weight_bytes: int
    """Of the weights that it keeps."""
    slot_dtype: torch.dtype
    """In which gradients leave and new weights come back."""
    slot_is_shard: bool = True
    """Whether the slot can be the only place of the weights in host memory."""
    weights_direct: bool = True
    """Whether what an update writes is what the device computes with; not so where it is packed afterwards."""


def place(parts: Sequence[Part], options: OffloadOptions, *, extra_bytes: int = 0) -> list[Shard | None]:
    """The shard of each part whose states are away; None where they stay on the device.

    extra_bytes: host memory that is taken beside the shards. ValueError where weights cannot be on drives.
    """
    if options.states == "none":
        return [None] * len(parts)
    if options.weights == "nvme" and not all(part.slot_is_shard for part in parts):
        raise ValueError(SLOT_APART)
    streams, room = options.streams_weights, options.gpu_bytes
    stay = 0
    for part in parts:
        room -= 12 * part.numel + (part.weight_bytes if streams else 0)
        if room < 0:
            break
        stay += 1
    away = parts[stay:]
    speculated = _speculated(away, options)
    shards = [
        Shard(
            numel=p.numel, dtype=p.slot_dtype, on_nvme=options.states == "nvme", pingpong=doubles, stays=streams,
            weights_first=options.update == "weights_first" and _made_apart(p, options),
            slot_follows=options.weights == "nvme",
        )
        for p, doubles in zip(away, speculated, strict=True)
    ]  # fmt: skip
    if options.states == "nvme":
        apart_bytes = sum(part.weight_bytes for part in away if streams and not part.slot_is_shard)
        _fill_host(shards, (options.host_bytes or 0) - extra_bytes - apart_bytes)
    return [None] * stay + shards


def _speculated(away: Sequence[Part], options: OffloadOptions) -> list[bool]:
    """Whose states are there twice: the last to run, as their gradients come first."""
    chosen = [False] * len(away)
    if options.update == "speculate":
        room = options.speculate_share * sum(part.numel for part in away)
        for i in reversed(range(len(away))):
            room -= away[i].numel
            if room < 0:
                break
            chosen[i] = _made_apart(away[i], options)
    return chosen


def _made_apart(part: Part, options: OffloadOptions) -> bool:
    """Whether new weights may be made beside the gradient."""
    return part.slot_is_shard if options.streams_weights else part.weights_direct


def _fill_host(shards: Sequence[Shard], limit_bytes: int) -> None:
    """Bring shards from NVMe into host memory while there is room, the first to run first. Those to be speculated on
    are there twice where room is left over, the last to run first: without it an update waits for its turn in host
    memory, and on a drive for the drive."""
    speculated = [shard for shard in shards if shard.pingpong]
    for shard in shards:
        shard.pingpong = False
    room = limit_bytes - host_bytes(shards)
    for shard in shards:
        before, shard.on_nvme = shard.host_bytes, False
        room -= shard.host_bytes - before
        if room < 0:
            shard.on_nvme = True
            break
    room, passing = limit_bytes - host_bytes(shards), 0
    for shard in [shard for shard in reversed(speculated) if not shard.on_nvme]:
        before, shard.pingpong = shard.host_bytes, True
        largest = max(passing, shard.passing_bytes)
        taken = shard.host_bytes - before + outgoing_bytes(largest) - outgoing_bytes(passing)
        if taken > room:
            shard.pingpong = False
        else:
            room, passing = room - taken, largest
