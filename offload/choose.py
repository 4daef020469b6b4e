"""``offload.states=auto``: what lives where, so that a step is the shortest that fits into the memory there is.

Every tier, with the weights on the device, streamed, or on drives beside their states, and updated just in time,
weights first or with one of a grid of shares to speculate on, is a candidate; each keeps as much on the device as there
is room for. A step's length is the mean over updates that are clipped and not (`CLIPPED`). Of those within 1% of the
shortest the one that wears the drives least is taken, and of these the one that needs the least host memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from offload.cost import Layer, Prediction, Rates, predict, seconds
from offload.options import OffloadOptions
from offload.placing import Part, place
from offload.shard import LEAVING

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Of what is away, how much is speculated on."""
CLIPPED = 0.1
"""Of the updates, how many are reckoned to be clipped: all at a run's start, few later."""
HEADROOM = 0.96
"""The part of the device's memory that is planned with: the rest is the allocator's and the driver's."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Memory of one rank that may be used."""

    device_bytes: float
    host_bytes: float
    nvme_bytes: float = 0.0
    """On the drives of ``offload.nvme_path``; 0: there are none."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What `choose` found: the options, what they lead to, and in words why these."""

    options: OffloadOptions
    prediction: Prediction
    device_bytes: int
    why: str


def device_bytes(
    layers: Sequence[Layer], options: OffloadOptions, *, micro_batches: int, activation_bytes: float
) -> int:
    """Device memory at a step's peak. activation_bytes: all that is neither weights, gradients nor states, nor known of
    a layer (`Layer.held_bytes`)."""
    parts = [(number, part) for number, layer in enumerate(layers) for part in layer.parts]
    placed = place([part for _, part in parts], options)
    streams = options.streams_weights
    largest = max((layer.gathered_bytes for layer in layers), default=0)
    needed = activation_bytes + largest  # one layer's gradients, as the backward makes them
    needed += 3 * largest if streams else sum(layer.frozen_bytes for layer in layers)
    leaving, made = 0, [0] * len(layers)
    for (number, part), shard in zip(parts, placed, strict=True):
        gradient = part.numel * (part.slot_dtype.itemsize if micro_batches == 1 else 4)
        if shard is None:
            apart = 4 if part.slot_dtype.itemsize != 4 else 0  # fp32 weights are the master weights
            needed += part.weight_bytes + (8 + apart) * part.numel
            made[number] += gradient
        else:
            needed += 0 if streams else part.weight_bytes
            leaving = max(leaving, LEAVING * part.numel * part.slot_dtype.itemsize)
            made[number] += gradient if micro_batches > 1 else 0
    return int(needed + leaving + _most_at_a_time([layer.held_bytes for layer in layers], made, micro_batches))


def _most_at_a_time(held: Sequence[int], made: Sequence[int], micro_batches: int) -> int:
    """Of what layers hold from forward to backward, and the gradients that stay once they are made: in one micro-batch
    the first have gone where the last come. The first layer's gradients, the root's, may come at any time."""
    if micro_batches > 1 or not held:
        return sum(held) + sum(made)
    before, behind = list(accumulate(held)), [0, *accumulate(reversed(made[1:]))][::-1]
    return made[0] + max(still + new for still, new in zip(before, behind, strict=True))


def choose(
    layers: Sequence[Layer],
    options: OffloadOptions,
    rates: Rates,
    room: MemoryBudget,
    *,
    micro_batches: int,
    activation_bytes: float,
) -> Chosen:
    """The best options for a rank that has `layers`; `options` are those of ``auto``. ValueError where nothing fits:
    how much is missing where."""
    found: list[Chosen] = []
    short: dict[str, tuple[float, str]] = {}  # by tier, what the candidate that needs least has too little of
    for candidate in _candidates(layers, options, room):
        fitted, needed = _fill_device(layers, candidate, room.device_bytes * HEADROOM, micro_batches, activation_bytes)
        missing = (needed, "on the device")
        if fitted is not None:
            predicted = predict(layers, fitted, rates, micro_batches=micro_batches)
            if predicted.host_bytes > room.host_bytes:
                missing = (predicted.host_bytes, "of host memory")
            elif predicted.nvme_bytes > room.nvme_bytes:
                missing = (predicted.nvme_bytes, "on the drives")
            else:
                found.append(Chosen(options=fitted, prediction=predicted, device_bytes=needed, why=""))
                continue
        short[_named(candidate)] = min(short.get(_named(candidate), missing), missing)
    if not found:
        there = (
            f"{room.device_bytes * HEADROOM / GIB:.3g} GiB on the device, {room.host_bytes / GIB:.3g} of host memory"
        )
        there += f", {room.nvme_bytes / GIB:.3g} on drives" if options.nvme_path else ", no drives (offload.nvme_path)"
        wanted = "; ".join(f"{name} needs {size / GIB:.3g} GiB {where}" for name, (size, where) in short.items())
        raise ValueError(
            f"offload.states=auto: nothing fits into {there}: {wanted}. What helps: "
            f"offload.nvme_path, more of offload.device_bytes or offload.host_bytes, "
            f"offload.activations=auto or checkpoint, a smaller train.micro_batch_size, more launch.workers"
        )
    shortest_s = min(_mean_s(item.prediction) for item in found)
    close = [item for item in found if _mean_s(item.prediction) <= 1.01 * shortest_s]
    best = min(close, key=lambda item: (item.prediction.written_bytes, item.prediction.host_bytes))
    return replace(best, why=_why(best, found))


def _mean_s(prediction: Prediction) -> float:
    return (1 - CLIPPED) * prediction.step_s + CLIPPED * prediction.clipped_step_s


def _candidates(layers: Sequence[Layer], options: OffloadOptions, room: MemoryBudget) -> Iterator[OffloadOptions]:
    slots_can_follow = all(part.slot_is_shard for layer in layers for part in layer.parts)
    yield replace(options, states="none", device_bytes=None)
    tiers = ["host", "nvme"] if options.nvme_path else ["host"]
    for states in tiers:
        host_bytes = int(room.host_bytes) if states == "nvme" else options.host_bytes
        for weights in ("device", "host", *(["nvme"] if states == "nvme" and slots_can_follow else [])):
            placed = replace(options, states=states, weights=weights, host_bytes=host_bytes, device_bytes=None)
            yield placed
            if states == "host":
                yield replace(placed, update="weights_first")
            for share in SHARES:
                yield replace(placed, update="speculate", speculate_share=share)


def _fill_device(
    layers: Sequence[Layer], options: OffloadOptions, limit: float, micro_batches: int, activation_bytes: float
) -> tuple[OffloadOptions | None, int]:
    """The options with as many parts on the device as fit, and what that takes; None, and the least, where not even
    none of them does."""
    parts: list[Part] = [part for layer in layers for part in layer.parts]

    def with_first(count: int) -> OffloadOptions:
        streamed = options.streams_weights
        return replace(options, gpu_bytes=sum(12 * p.numel + streamed * p.weight_bytes for p in parts[:count]))

    def needed(count: int) -> int:
        chosen = options if options.states == "none" else with_first(count)
        return device_bytes(layers, chosen, micro_batches=micro_batches, activation_bytes=activation_bytes)

    least = needed(0)
    if least > limit:
        return None, least
    if options.states == "none":
        return options, least
    low, high = 0, len(parts)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= limit else (low, middle - 1)
    return with_first(low), needed(low)


def _named(options: OffloadOptions) -> str:
    """What a candidate of this tier would be typed as."""
    weights = f" offload.weights={options.weights}" if options.weights != "device" else ""
    return f"offload.states={options.states}{weights}"


def overrides(options: OffloadOptions) -> str:
    """What to type for options that `choose` made."""
    said = [_named(options)]
    if options.states != "none":
        said.append(f"offload.gpu_bytes={options.gpu_bytes}")
    if options.update == "speculate":
        said.append(f"offload.update=speculate offload.speculate_share={options.speculate_share:g}")
    elif options.update != OffloadOptions.update:
        said.append(f"offload.update={options.update}")
    if options.states == "nvme":
        said.append(f"offload.host_bytes={options.host_bytes}")
    return " ".join(said)


def _why(best: Chosen, found: Sequence[Chosen]) -> str:
    others = [item for item in found if item.options.states != best.options.states]
    said = overrides(best.options)
    if others:
        other = min(others, key=lambda item: item.prediction.step_s)
        said += f"; the best with offload.states={other.options.states} takes {seconds(other.prediction.step_s)}"
    return said
