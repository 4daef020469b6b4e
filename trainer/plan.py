"""What is derived from a job before step 0, in words."""

from parallel import Mesh, Placement
from parallel.engine import Engine
from parallel.transport import Transport
from trainer.build import Rank, choose_dtype, mesh_of
from trainer.data import Corpus
from trainer.job import Job
from trainer.models import LanguageModel
from trainer.progress import plural, size
from trainer.run import run_path

AWAY = {"host": "offloaded to host memory", "nvme": "offloaded to NVMe"}


def describe(job: Job, where: Rank, corpus: Corpus, model: LanguageModel, engine: Engine) -> str:
    """Aligned lines: parameters, FLOPs, world, mesh and placement, micro-batches, bytes of state, dtype and why."""
    num_params = sum(parameter.numel() for parameter in model.parameters())
    flops = model.flops_per_token(job.train.seq_len)
    dtype, why = choose_dtype(job.train.dtype, where.device)
    micro, count = job.micro_batches(where.world)
    tokens, sharing = job.train.global_batch_size * job.train.seq_len, job.parallel.sequence_ranks
    groups = plural(where.world, "rank") if sharing == 1 else f"{where.world // sharing} x {sharing} ranks"
    state = engine.state_bytes()
    away = "".join(f"; {size(num)} {place}" for name, place in AWAY.items() if (num := state.pop(name, 0)))
    tier = "GPU" if where.device.type == "cuda" else "host"
    held = ", ".join(f"{kind} {size(held)}" for kind, held in state.items() if held)
    rows = {
        "model": f"{job.model.name}, {num_params / 1e6:,.2f} M parameters, {flops / 1e6:,.1f} MFLOPs a token",
        "data": corpus.describe(),
        "world": f"{where.world} x {where.device.type}, {_mesh(job, where)}",
        **_transport(job, where),
        "step": f"{tokens:,} tokens = {groups} x {plural(count, 'micro-batch', 'es')} x {micro} x {job.train.seq_len}",
        "state": f"{size(sum(state.values()))} a rank in {tier} memory{f' ({held})' if held else ''}{away}",
        **_activations(job, model),
        "dtype": f"{str(dtype).removeprefix('torch.')}: {why}",
        "run": _saved(job),
    }
    return "\n".join(f"{name:>6}  {text}" for name, text in rows.items())


def _activations(job: Job, model: LanguageModel) -> dict[str, str]:
    """What blocks do with their activations, where they do not just keep them."""
    options, num = job.offload.activations, len(model.blocks())
    if options.mode == "keep":
        return {}
    kept = options.num_kept(num)
    alpha = "what hides behind compute" if options.alpha is None else f"{options.alpha:g} of the tokens"
    where = "to host memory" + (", and on to NVMe where that is short" if job.offload.nvme_path else "")
    how = {
        "swap": f"swap {alpha} {where}, the rest is recomputed",
        "input": f"swap their input alone {where}, all is recomputed",
        "stream": f"run by tiles of {options.stream_tokens} tokens, their input and attention's output go {where}",
        "stream_input": f"run by tiles of {options.stream_tokens} tokens, their input alone goes {where}",
        "recompute": "keep their input and attention's output, the rest is recomputed",
        "checkpoint": "keep their input, all is recomputed",
    }["swap" if options.mode == "auto" else options.mode]
    return {"blocks": f"{num - kept} {how}" + (f"; the last {kept} keep all" if kept else "")}


def _saved(job: Job) -> str:
    """Where the run lies, and when its state is saved."""
    options = job.checkpoint
    often = f"every {options.every_steps} steps and " if options.every_steps else ""
    where = f" in {options.url}" if options.url else ""
    every = options.snapshot_every_steps
    memory = f"; snapshots in memory every {'few' if every == 'auto' else every} steps" if options.snapshots else ""
    return f"{run_path(job)}, checkpoints{where} {often}at the end{memory}"


def _mesh(job: Job, where: Rank) -> str:
    if job.engine != "native":
        return f"engine {job.engine}, {job.parallel.placement}"
    mesh, placement = _placed(job, where)
    return f"mesh {mesh}, {job.parallel.placement}: {placement.describe(mesh.names)}"


def _transport(job: Job, where: Rank) -> dict[str, str]:
    """What is quantized on its way, if anything was asked to be."""
    if not job.parallel.quantizes:
        return {}
    mesh, placement = _placed(job, where)
    return {"links": Transport.of(job.parallel, mesh, placement).describe(mesh.names)}


def _placed(job: Job, where: Rank) -> tuple[Mesh, Placement]:
    mesh = mesh_of(job, where)
    return mesh, Placement.of(job.parallel, mesh.num_levels)
