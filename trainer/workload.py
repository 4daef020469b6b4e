"""A job's numbers for a cost model: what its units hold and compute, from its model on ``meta``."""

from dataclasses import replace

from offload.options import ActivationOptions
from parallel.planning.workload import Workload
from trainer.job import Job
from trainer.models import LanguageModel


def workload_of(job: Job, model: LanguageModel, world: int, *, compute_bytes: int) -> Workload:
    """Of one rank of `world`. compute_bytes: of an element of the compute dtype. What activations take is estimated
    from the units; `trainer.footprint` knows it better."""
    micro, count = job.micro_batches(world)
    options = job.parallel
    work = Workload.read(
        model,
        seq_len=job.train.seq_len,
        micro_batch_size=micro,
        micro_batches=count,
        compute_bytes=compute_bytes,
        reduce_bytes=2 if options.reduce_dtype == "bf16" else 4,
        moments=2 if job.optimizer.name == "adamw" else int(job.optimizer.momentum > 0),
        prefetch_units=options.prefetch_units,
        recompute=products_again(job.offload.activations),
        recompute_attention=job.offload.activations.mode == "checkpoint" or job.offload.activations.input_alone,
        loss_chunk_tokens=job.model.loss_chunk_tokens,
        exact=options.exact,
    )
    return replace(work, overlap=options.overlap)


def products_again(options: ActivationOptions) -> float:
    """The share of a block's products that its backward does again; an α that is not chosen yet counts as 0."""
    if options.mode == "keep":
        return 0.0
    return 1.0 - (options.alpha or 0.0)
