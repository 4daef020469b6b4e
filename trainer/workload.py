"""A job's numbers for a cost model: what its units hold and compute, from its model on ``meta``."""

from dataclasses import replace

from offload.activations.attention_spread import Tiling
from offload.options import ActivationOptions
from parallel.planning.workload import Exchange, Workload
from parallel.sequence import SequenceParallel
from trainer.job import Job
from trainer.models import LanguageModel


def workload_of(job: Job, model: LanguageModel, world: int, *, compute_bytes: int) -> Workload:
    """Of one rank of `world`. compute_bytes: of an element of the compute dtype. What activations take is estimated
    from the units; `trainer.footprint` knows it better. ValueError for sequences that ranks cannot share."""
    micro, count = job.micro_batches(world)
    options, activations = job.parallel, job.offload.activations
    work = Workload.read(
        model,
        seq_len=job.train.seq_len,
        micro_batch_size=micro,
        micro_batches=count,
        compute_bytes=compute_bytes,
        reduce_bytes=2 if options.reduce_dtype == "bf16" else 4,
        moments=2 if job.optimizer.name == "adamw" else int(job.optimizer.momentum > 0),
        prefetch_units=options.prefetch_units,
        recompute=products_again(activations),
        recompute_attention=activations.mode == "checkpoint" or activations.input_alone,
        keep_last=activations.num_kept(len(model.blocks())),
        exchange=_exchange(job, model, micro, compute_bytes),
        loss_chunk_tokens=job.model.loss_chunk_tokens,
        exact=options.exact,
    )
    return replace(work, overlap=options.overlap)


def _exchange(job: Job, model: LanguageModel, micro_batch_size: int, compute_bytes: int) -> Exchange | None:
    """What a block sends to the ranks that have the other tokens of its sequences; None where no ranks share any."""
    ranks, activations = job.parallel.sequence_ranks, job.offload.activations
    if ranks == 1:
        return None
    sequence = SequenceParallel.pretended(ranks)
    check_shared(job, model, sequence)
    num_tiles = len(tiles_of(job, sequence, micro_batch_size).tiles)
    return Exchange.of(
        job.parallel.sequence, ranks, model.num_heads, compute_bytes * model.head_dim,
        num_tiles=num_tiles if activations.streams else 0, again=activations.mode != "keep",
    )  # fmt: skip


def check_shared(job: Job, model: LanguageModel, sequence: SequenceParallel) -> None:
    """ValueError where the ranks of `sequence` cannot share heads, or tokens, or nothing that this model makes."""
    if sequence.size > 1:
        model.check_shared(job.train.seq_len, sequence.size)
        sequence.check_heads(*model.num_heads)
        sequence.lengths(job.train.seq_len)


def tiles_of(job: Job, sequence: SequenceParallel, micro_batch_size: int) -> Tiling:
    """In what tiles of its tokens a rank sends them: in one, where blocks do not run by tiles."""
    lengths, activations = sequence.lengths(job.train.seq_len), job.offload.activations
    tokens = max(1, activations.stream_tokens // micro_batch_size) if activations.streams else max(lengths)
    return Tiling.of(lengths, sequence.rank, tokens)


def products_again(options: ActivationOptions) -> float:
    """The share of a block's products that its backward does again; an α that is not chosen yet counts as 0."""
    if options.mode == "keep":
        return 0.0
    return 1.0 - (options.alpha or 0.0)
