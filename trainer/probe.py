"""How long a block of a model takes, and what it keeps: read from the same model cut to two blocks (and to one).

Nothing of the job is touched: the probe has random weights, random tokens and no optimizer states, is one rank alone,
and leaves the random numbers as they were. Where ranks share sequences it has the first one's part of the tokens, and
attends to all of them for its heads, but sends to itself. What it compiles, the model's blocks need not compile again.
"""

import gc
import statistics
import time
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from offload.activations.memory import elapsed_s, now
from offload.options import OffloadOptions
from parallel.options import OptimizerOptions, ParallelOptions
from parallel.sequence import SequenceParallel
from trainer.build import Rank, build_engine
from trainer.job import Job
from trainer.models import LanguageModel, build_model
from trainer.models.attention import attention_backends
from trainer.options import HFOptions, LlamaOptions, ModelOptions
from trainer.workload import tiles_of

WARM_UP, ROUNDS = 2, 5
SHORT_S = {"cpu": 0.5, "cuda": 2.0}
"""So long it takes at least, however many rounds that are. A GPU that has idled computes faster at first than its
power limit lets it go on."""
LONG_S = 4.0
"""After so long two rounds are enough."""


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


def probe(job: Job, *, micro_batch_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Probed:
    """Run micro-batches through the job's model cut to two blocks, and on a GPU to one.

    With weights on the device, whose embedding and head may be large; where that does not fit and the job's states are
    away, with weights that come from host memory, which takes what the job takes at the least. ValueError for a model
    that cannot be cut; torch.OutOfMemoryError where not even that fits.
    """
    try:
        return _probe(job, OffloadOptions(), micro_batch_size, vocab_size, dtype, device)
    except torch.OutOfMemoryError:
        if not job.offload.away:
            raise
    release(device)  # not before: the error held what was in use
    away = OffloadOptions(states="host", weights="host", threads=job.offload.threads)
    return _probe(job, away, micro_batch_size, vocab_size, dtype, device)


def _probe(
    job: Job, offload: OffloadOptions, micro_batch_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Probed:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        times, two = _run(job, offload, 2, micro_batch_size, vocab_size, dtype, device)
        one = _run(job, offload, 1, micro_batch_size, vocab_size, dtype, device)[1] if devices else two
    block_bytes = max(0.0, two.kept - one.kept)
    return Probed(
        block_forward_s=times.block_forward_s,
        block_backward_s=times.block_backward_s,
        rest_forward_s=max(0.0, times.forward_s - 2 * times.block_forward_s),
        rest_backward_s=max(0.0, times.backward_s - 2 * times.block_backward_s),
        block_bytes=block_bytes if devices else None,
        rest_bytes=max(0.0, one.peak - block_bytes) if devices else None,  # with a few gradients: on the safe side
    )


def sending_s(
    job: Job,
    model: LanguageModel,
    sequence: SequenceParallel,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Seconds that a block's forward takes longer than `probe` found, as what the ranks of `sequence` have to do with
    each other is sent. Collective over them."""
    tiling = tiles_of(job, sequence, micro_batch_size)
    lengths, mine = tiling.sizes(0), tiling.tiles[0]
    heads, kv_heads = model.num_heads
    q, k, v = (
        torch.zeros(micro_batch_size, num, mine.stop, model.head_dim, dtype=dtype, device=device)
        for num in (heads, kv_heads, kv_heads)
    )

    def taken_s(among: SequenceParallel) -> float:
        start = now(device)
        whole, *_ = among.to_heads((q, k, v), lengths)
        among.to_tokens(whole, lengths)
        return elapsed_s(start, now(device))

    fastest = [
        min([taken_s(among) for _ in range(WARM_UP + ROUNDS)][WARM_UP:])
        for among in (sequence, SequenceParallel.pretended(sequence.size))
    ]
    return len(tiling.tiles) * max(0.0, fastest[0] - fastest[1])


def cut(options: ModelOptions, num_blocks: int) -> ModelOptions:
    """The same model with fewer blocks and random weights."""
    if isinstance(options, LlamaOptions):
        return replace(options, num_layers=num_blocks)
    if isinstance(options, HFOptions):
        overrides = options.overrides | {"num_hidden_layers": str(num_blocks)}
        return replace(options, from_scratch=True, overrides=overrides)
    raise ValueError(f"a model by {type(options).__name__} cannot be cut to fewer blocks")


@dataclass(frozen=True)
class _Times:
    forward_s: float
    backward_s: float
    block_forward_s: float
    block_backward_s: float


@dataclass(frozen=True, kw_only=True)
class _Bytes:
    """On the device, beside weights and states."""

    kept: int
    """Where the forward ends."""
    peak: int


_UNSWAPPED = {"swap": "recompute", "auto": "recompute", "input": "checkpoint"}
"""What computes as much again, with nothing in host memory."""


def _run(
    job: Job,
    offload: OffloadOptions,
    num_blocks: int,
    micro_batch_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[_Times, _Bytes]:
    """Seconds of the whole and of its last block, and what they take. offload: of weights and states."""
    activations = job.offload.activations
    mode = _UNSWAPPED.get(activations.mode, activations.mode)
    activations = replace(activations, mode=mode, alpha=None, host_bytes=None)  # host memory holds that of a few blocks
    sequence, whole = SequenceParallel.pretended(job.parallel.sequence_ranks), job.train.seq_len
    seq_len = sequence.lengths(whole)[0]
    alone = replace(
        job,
        model=cut(job.model, num_blocks),
        optimizer=OptimizerOptions() if offload.away else OptimizerOptions(name="sgd", momentum=0.0),
        parallel=ParallelOptions(),
        train=replace(job.train, seq_len=seq_len),
        # which blocks swap how much depends on how many there are
        offload=replace(offload, activations=activations),
    )
    model = build_model(alone.model, vocab_size=vocab_size, seq_len=seq_len, dtype=dtype, device=device)
    watch = _Watch(device)
    engine = build_engine(alone, model, Rank(0, 1, device), dtype, say=lambda _: None)
    watch.hook(model, model.blocks()[-1])
    rows = torch.randint(0, vocab_size, (micro_batch_size, seq_len + 1), device=device)
    found: list[_Times] = []
    with attention_backends(device):
        begin_s = time.perf_counter()
        while not _enough(len(found) - WARM_UP, time.perf_counter() - begin_s, SHORT_S[device.type]):
            watch.start()
            with sequence.attention(whole):
                engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1.0, first=True, last=True)
            found.append(watch.stop())
            taken = watch.bytes_beside(engine.state_bytes())
            engine.step(0.0, None)
            if len(found) <= WARM_UP:
                begin_s = time.perf_counter()
    engine.close()
    del engine, model, rows, watch
    release(device)
    late = device.type == "cuda"
    counted = found[-(len(found) // 2) :] if late else found[WARM_UP:]
    typical = statistics.median if late else min  # on a CPU others disturb
    columns = zip(*(astuple(times) for times in counted), strict=True)
    return _Times(*(typical(column) for column in columns)), taken


def release(device: torch.device) -> None:
    """Give back the memory of what is not used any more: models and their hooks hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _enough(rounds: int, passed_s: float, least_s: float) -> bool:
    return rounds >= ROUNDS and passed_s > least_s or rounds >= 2 and passed_s > LONG_S


class _Watch:
    """Times of a micro-batch and of one block in it, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._marks: dict[str, Any] = {}
        self._kept = 0

    def hook(self, model: nn.Module, block: nn.Module) -> None:
        def before(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            entering = inputs[0] if inputs else options["hidden_states"]
            entering.register_hook(lambda _: self._mark("block left"))
            self._mark("block begins")

        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            self._mark("block ends")
            leaving: Tensor = output if isinstance(output, Tensor) else output[0]
            leaving.register_hook(lambda _: self._mark("block entered"))

        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)
        model.register_forward_hook(lambda *_: self._forward_ends())

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._mark("begins")

    def stop(self) -> _Times:
        self._mark("ends")
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return _Times(
            forward_s=self._between("begins", "forward ends"),
            backward_s=self._between("forward ends", "ends"),
            block_forward_s=self._between("block begins", "block ends"),
            block_backward_s=self._between("block entered", "block left"),
        )

    def bytes_beside(self, held: dict[str, int]) -> _Bytes:
        """Of the micro-batch that was stopped. held: what the engine has; its buffers come and go with units."""
        if not self._cuda:
            return _Bytes(kept=0, peak=0)
        own = sum(size for name, size in held.items() if name not in ("buffers", "host", "nvme"))
        return _Bytes(kept=self._kept - own, peak=torch.cuda.max_memory_allocated(self._device) - own)

    def _forward_ends(self) -> None:
        self._mark("forward ends")
        if self._cuda:
            self._kept = torch.cuda.memory_allocated(self._device)

    def _mark(self, name: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def _between(self, first: str, last: str) -> float:
        start, end = self._marks[first], self._marks[last]
        return float(start.elapsed_time(end) / 1e3 if self._cuda else end - start)
