"""How long a step takes while states are away, and what limits it: predicted from measured rates.

`predict` plays one rank's steps on five things that each do one thing at a time: the device computes; a link brings
weights to it, another takes gradients away; a thread updates, in host memory or through the drives, which weights and
gradients may pass, too. A step is then the largest of what each is busy, plus what one waits for another at the ends:
the first units' updates, the last units' gradients. The rules are those of `offload/states.py`; times are of
micro-batches that the device computes alone.

Source: Fuyou, arXiv 2403.06504, sec. 4.3 (its cost model has the same terms, without the order within a step).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from offload.options import OffloadOptions
from offload.placing import Part, place
from offload.shard import Shard, host_bytes, nvme_bytes

COMPUTE, HOST, DRIVE, INTO, OUT = "compute", "host memory", "the drives", "the link to the device", "the link from it"
READ, WRITTEN = "read", "written"
STEPS = 4
"""Played until one follows the other alike."""
MICRO_BATCHES = 3
"""Played at most: those between the first and the last are alike."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine reaches; of one rank while all of its machine do the same."""

    update: float
    """Parameters/s of the CPU optimizer, in place."""
    pingpong: float
    """The same into a second copy of the states."""
    weights: float
    """The same of new weights alone, the states left as they are."""
    states: float
    """The same of new states alone, in place."""
    resident: float
    """Parameters/s of the optimizer on the device."""
    into: float
    """Bytes/s from host memory to the device."""
    out: float
    """Bytes/s from the device to host memory."""
    drive: float | None = None
    """Bytes/s of the drives together, read and written at once: the sum of both ways. None: not measured."""
    shared: float = 0.0
    """Part of what the device computes with that an update takes from it: on a CPU its threads over the cores."""

    def __post_init__(self) -> None:
        for name in ("update", "pingpong", "weights", "states", "resident", "into", "out"):
            if getattr(self, name) <= 0:
                raise ValueError(f"a machine's rate {name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A unit of the model on one rank, in the order in which they run."""

    forward_s: float
    """Of one micro-batch."""
    backward_s: float
    """Of one micro-batch, with recomputation."""
    parts: tuple[Part, ...]
    frozen_bytes: int = 0
    """Of weights that do not train, as this rank keeps them."""
    gathered_bytes: int = 0
    """Of all its weights, as they are computed with."""
    held_bytes: int = 0
    """Of activations, from its forward to its backward, where that is known of each layer."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step of one rank: seconds, bytes that it holds by place, and bytes that move."""

    step_s: float
    clipped_step_s: float
    """Where the update is clipped, so that nothing that was speculated stands."""
    compute_s: float
    """What the device computes, the update of the states it has included."""
    bottleneck: str
    busy_s: dict[str, float]
    """Seconds of a step that each is busy."""
    host_bytes: int
    nvme_bytes: int
    written_bytes: int
    """To the drives, a step."""
    read_bytes: int
    """From the drives, a step."""
    into_bytes: int
    """To the device, a step."""
    out_bytes: int

    def __str__(self) -> str:
        clipped = ""
        if self.clipped_step_s > 1.02 * self.step_s:
            clipped = f" ({seconds(self.clipped_step_s)} where the update is clipped)"
        busy = ", ".join(f"{name} {seconds(busy)}" for name, busy in self.busy_s.items() if busy > 0.005 * self.step_s)
        return f"{seconds(self.step_s)} a step{clipped}, limited by {self.bottleneck}; busy: {busy}"


def seconds(value: float) -> str:
    """As one reads it: of three figures, in s or ms."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def predict(layers: Sequence[Layer], options: OffloadOptions, rates: Rates, *, micro_batches: int) -> Prediction:
    """What a step takes with these options, which name a tier (not ``auto``). ValueError where states go to drives
    whose rate is not known."""
    play = _Play(layers, options, rates, micro_batches)
    if rates.drive is None and any(shard.on_nvme for shard in play.shards):
        raise ValueError("offload.states=nvme: the rate of the drives was not measured")
    step_s, clipped_s = play.lasting_s(clipped=False), play.lasting_s(clipped=True)
    play.lasting_s(clipped=False)  # what it was busy with is asked below
    away_s = play.busy[HOST] * rates.shared
    slower = max(0.0, play.busy[COMPUTE] + away_s - step_s)
    return Prediction(
        step_s=step_s + slower,
        clipped_step_s=clipped_s + slower,
        compute_s=play.busy[COMPUTE],
        bottleneck=HOST if slower > 0.05 * step_s else play.bottleneck(step_s),
        busy_s=dict(play.busy),
        host_bytes=host_bytes(play.shards) + play.apart_bytes,
        nvme_bytes=nvme_bytes(play.shards),
        written_bytes=int(play.moved[WRITTEN]),
        read_bytes=int(play.moved[READ]),
        into_bytes=int(play.moved[INTO]),
        out_bytes=int(play.moved[OUT]),
    )


class _Play:
    """Steps of one rank, one after the other."""

    def __init__(self, layers: Sequence[Layer], options: OffloadOptions, rates: Rates, micro_batches: int) -> None:
        self._layers, self._rates = layers, rates
        self._micro_batches = min(micro_batches, MICRO_BATCHES)
        self._more = micro_batches - self._micro_batches
        streams = options.streams_weights
        parts = [part for layer in layers for part in layer.parts]
        frozen_bytes = sum(layer.frozen_bytes for layer in layers) if streams else 0
        placed = iter(zip(parts, place(parts, options, extra_bytes=frozen_bytes), strict=True))
        self._away: list[list[Shard]] = []
        self._brought: list[int] = []  # bytes that a use of the layer brings to the device
        self._resident, self.apart_bytes = 0, frozen_bytes
        for layer in layers:
            away, brought = [], layer.frozen_bytes if streams else 0
            for _ in layer.parts:
                part, shard = next(placed)
                if shard is None:
                    self._resident += part.numel
                    continue
                away.append(shard)
                if streams:
                    brought += part.weight_bytes
                    self.apart_bytes += 0 if part.slot_is_shard else part.weight_bytes
            self._away.append(away)
            self._brought.append(brought)
        self.shards = [shard for away in self._away for shard in away]
        self._loaded = [sum(shard.slot_bytes for shard in away) for away in self._away]  # from drives, for a use of it
        self._reset()

    def lasting_s(self, *, clipped: bool) -> float:
        """Seconds of a step that follows others like it."""
        self._device = self._into = self._out = self._host = self._drives = self._known = self._before = 0.0
        self._asked: dict[int, float] = {}  # when the weights of layers that were asked for have been loaded
        self._arrived: dict[Shard, float] = dict.fromkeys(self.shards, 0.0)
        self._stands: dict[Shard, float] = {}
        before = 0.0
        for _ in range(STEPS):
            before = self._known
            self._reset()
            self._step(clipped)
        return self._known - before

    def _reset(self) -> None:
        """Begin to count anew, for a step."""
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.waits: defaultdict[str, float] = defaultdict(float)
        self.moved: defaultdict[str, float] = defaultdict(float)
        """Bytes, by what carries them; `READ` and `WRITTEN` by the drives."""

    def bottleneck(self, step_s: float) -> str:
        """Compute, or what makes the device wait most where it waits for more than 5% of the step."""
        cause, waited = max(self.waits.items(), key=lambda item: item[1], default=(COMPUTE, 0.0))
        return cause if sum(self.waits.values()) > 0.05 * step_s else COMPUTE

    def _step(self, clipped: bool) -> None:
        ready = [self._update(i) for i in range(len(self._layers))]
        self._stands = {}
        self._work(sum(shard.numel for shard in self.shards if shard.weights_first) / self._rates.states)
        order, last = range(len(self._layers)), self._micro_batches - 1
        for micro in range(self._micro_batches):
            begin = self._device, self.busy.copy(), self.waits.copy(), self.moved.copy()
            for i in order:
                self._compute(i, self._layers[i].forward_s, ready[i] if micro == 0 else (0.0, HOST))
                if micro and i < order[-1]:
                    self._ask(i + 1)
            for i in reversed(order):
                self._compute(i, self._layers[i].backward_s, (0.0, HOST), gathered=i == order[-1])
                if i or micro < last:
                    self._ask(max(0, i - 1))
                for shard in self._away[i] if micro == last else ():
                    self._leave(shard)
            if micro == 1:
                self._repeat(*begin)
        resident_s = self._resident / self._rates.resident
        self._device += resident_s
        self.busy[COMPUTE] += resident_s
        self._known = self._device
        for away in [] if clipped else reversed(self._away):
            for shard in away:
                self._guess(shard)

    def _repeat(self, begin_s: float, *before: dict[str, float]) -> None:
        """Let the micro-batches that are not played take what the one since `begin_s` took. before: what was counted
        then."""
        passed_s = self._more * (self._device - begin_s)
        self._device, self._into, self._before = (t + passed_s for t in (self._device, self._into, self._before))
        self._drives += passed_s
        self._asked = {i: loaded + passed_s for i, loaded in self._asked.items()}
        for counter, counted in zip((self.busy, self.waits, self.moved), before, strict=True):
            for name in counter:
                counter[name] += self._more * (counter[name] - counted.get(name, 0.0))

    def _update(self, i: int) -> tuple[float, str]:
        """Just in time: when a layer's new weights are there, and what they waited for last."""
        ready, cause = 0.0, HOST
        for shard in self._away[i]:
            if shard in self._stands:
                ready = max(ready, self._stands[shard])
                continue
            start = max(self._host, self._known, self._arrived[shard])
            seconds_ = shard.numel / (self._rates.weights if shard.weights_first else self._rates.update)
            cause = OUT if start - max(self._host, self._known) > seconds_ else HOST
            self._work(seconds_, start)
            if shard.on_nvme:
                stored = self._pass(start, read=shard.nvme_bytes, written=shard.nvme_bytes)
                cause = DRIVE if stored > self._host else HOST
                self._host = max(self._host, stored)
            ready = max(ready, self._send(shard))
        if self._loaded[i]:
            ready, cause = self._pass(self._host, read=self._loaded[i]), DRIVE
        return ready, cause

    def _work(self, taken_s: float, start: float = 0.0) -> None:
        """Let the thread be busy with an update that it may begin at `start`."""
        self._host = max(self._host, start) + taken_s
        self.busy[HOST] += taken_s

    def _pass(self, start: float, *, read: int = 0, written: int = 0) -> float:
        """When the drives are through with what was asked of them at `start`."""
        assert self._rates.drive is not None
        taken_s = (read + written) / self._rates.drive
        self._drives = max(self._drives, start) + taken_s
        self.busy[DRIVE] += taken_s
        self.moved[READ] += read
        self.moved[WRITTEN] += written
        return self._drives

    def _ask(self, i: int) -> None:
        """Ask for the weights of the layer that runs next, as one begins to compute."""
        if self._loaded[i]:
            self._asked[i] = self._pass(self._before, read=self._loaded[i])

    def _guess(self, shard: Shard) -> None:
        """Speculation, in what is left of the backward once the gradient is there."""
        start = max(self._host, self._arrived[shard])
        if shard.pingpong and start < self._known:
            self._work(shard.numel / self._rates.pingpong, start)
            self._stands[shard] = self._send(shard)

    def _send(self, shard: Shard) -> float:
        """When weights that the device keeps are there; those that stay in host memory are brought by their use."""
        return self._host if shard.stays else self._bring(shard.numel * shard.dtype.itemsize, self._host)

    def _bring(self, size_bytes: int, start: float) -> float:
        taken_s = size_bytes / self._rates.into
        self._into = max(self._into, start) + taken_s
        self.busy[INTO] += taken_s
        self.moved[INTO] += size_bytes
        return self._into

    def _compute(self, i: int, compute_s: float, ready: tuple[float, str], gathered: bool = False) -> None:
        """A layer's forward or backward. gathered: its weights are there from its forward."""
        after, cause = max(ready, (self._asked.pop(i, 0.0), DRIVE))
        if self._brought[i] and not gathered:
            brought = self._bring(self._brought[i], max(after, self._before))
            if brought > max(after, self._device) + 1e-9 and after <= self._device:
                cause = INTO
            after = brought
        if after > self._device:
            self.waits[cause] += after - self._device
        # from when a layer begins on the next one's weights may come: there are two places
        self._before, self._device = self._device, max(self._device, after) + compute_s
        self.busy[COMPUTE] += compute_s

    def _leave(self, shard: Shard) -> None:
        size_bytes = shard.numel * shard.dtype.itemsize
        taken_s = size_bytes / self._rates.out
        self._out = max(self._out, self._device) + taken_s
        self._arrived[shard] = self._out
        self.busy[OUT] += taken_s
        self.moved[OUT] += size_bytes
        if shard.slot_on_nvme:
            self._arrived[shard] = self._pass(self._out, written=shard.slot_bytes)
