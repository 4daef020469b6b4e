"""Checks across parts, on the driver, before a worker or a GPU is taken. All raise ValueError."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.options import CheckpointOptions
from launch.config import Config
from launch.options import LaunchOptions
from parallel.options import ParallelOptions
from trainer.job import Job
from trainer.options import HFOptions, LlamaOptions

if TYPE_CHECKING:
    import torch

    from parallel.mesh import Mesh
    from parallel.placement import Placement
    from parallel.transport import Transport
    from trainer.models import LanguageModel

BASELINE_PLACEMENTS = {"fsdp2": ("ddp", "zero2", "zero3", "hsdp"), "deepspeed": ("zero1", "zero2", "zero3")}
"""What one sharding for parameters, gradients and optimizer states (FSDP2), or a ZeRO stage, can express."""

UNREAD = {"fsdp2": ("overlap",), "deepspeed": ("overlap", "prefetch_units")}
"""Options that would change nothing."""


@dataclass(frozen=True)
class Machine:
    """A node that workers can be placed on."""

    address: str
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.address} with {self.cpus} CPUs and {self.gpus} GPUs"


@dataclass(frozen=True)
class Crew:
    """The workers of a job: how many, on how many nodes, on which kind of device."""

    workers: int
    nodes: int
    device: str

    @property
    def per_node(self) -> int:
        return self.workers // self.nodes


def find_crew(options: LaunchOptions, machines: list[Machine]) -> Crew:
    """The workers that `options` ask for, given what there is; ValueError where it is not enough."""
    if len(machines) < options.nodes:
        advice = (
            "launch.address names a cluster with more"
            if options.address is None
            else "start more, or lower launch.nodes"
        )
        raise ValueError(f"launch.nodes={options.nodes}, but {_there_is(machines)}; {advice}")
    most_gpus = sorted((machine.gpus for machine in machines), reverse=True)[: options.nodes]
    device = options.device if options.device != "auto" else "cuda" if most_gpus[0] else "cpu"
    if device == "cuda" and not most_gpus[-1]:
        raise ValueError(
            f"launch.device={options.device} on launch.nodes={options.nodes} needs GPUs; {_there_is(machines)}"
        )
    default = most_gpus[-1] * options.nodes if device == "cuda" else max(2, options.nodes)
    crew = Crew(options.workers or default, options.nodes, device)
    if crew.workers % crew.nodes:
        raise ValueError(f"launch.workers={crew.workers} must be divisible by launch.nodes={crew.nodes}")
    _check_capacity(crew, machines, options)
    return crew


def _check_capacity(crew: Crew, machines: list[Machine], options: LaunchOptions) -> None:
    local_cpu = options.address is None and crew.device == "cpu"
    if local_cpu:
        return  # our own cluster: workers may share cores
    kind = "GPUs" if crew.device == "cuda" else "CPUs"
    able = [machine for machine in machines if (machine.gpus if kind == "GPUs" else machine.cpus) >= crew.per_node]
    if len(able) < crew.nodes:
        where = "on one node" if crew.nodes == 1 else f"on each of {crew.nodes} nodes"
        other = "; launch.device=cpu does without" if kind == "GPUs" else ""
        raise ValueError(
            f"launch.workers={crew.workers} on launch.nodes={crew.nodes} needs {crew.per_node} {kind} {where}, "
            f"but {_there_is(machines)}; lower launch.workers or change launch.nodes{other}"
        )


def _there_is(machines: list[Machine]) -> str:
    are = "is 1 node" if len(machines) == 1 else f"are {len(machines)} nodes"
    return f"there {are}: " + ", ".join(str(machine) for machine in machines)


def check(config: Config, crew: Crew) -> Config:
    """Everything that can be known before the start. Returns the config with ``parallel.levels`` filled in."""
    from trainer.run import check_run

    config = check_options(config, crew)
    _check_transports(config, crew)
    if config.launch.address is None:
        _check_files(config)
        _check_model(config, crew.device)
    check_run(config.job())
    return config


def check_options(config: Config, crew: Crew) -> Config:
    """The part of `check` that needs no files and no model: also where the job will not run."""
    _check_engine(config)
    config = replace(config, parallel=_check_levels(config, crew))
    config.micro_batches(crew.workers)
    _check_numbers(config)
    _check_offload(config)
    _check_idle(config)
    _check_checkpoint(config.checkpoint, crew)
    return config


def _check_levels(config: Config, crew: Crew) -> ParallelOptions:
    """With levels: those that were given, else the named machine's, else what Ray's placement says."""
    from parallel.planning.machine import load_machine

    options = config.parallel
    inner = {"gpu" if crew.device == "cuda" else "worker": crew.per_node}
    named = load_machine(config.machine).levels(crew.workers) if config.machine else {}
    levels = options.levels or named or ({"node": crew.nodes} | inner if crew.nodes > 1 else inner)
    if math.prod(levels.values()) != crew.workers:
        shown = " x ".join(f"{name} {size}" for name, size in levels.items())
        raise ValueError(
            f"parallel.levels ({shown}) multiply to {math.prod(levels.values())}, but launch.workers={crew.workers}; "
            f"change one of them"
        )
    check_sequence(config, levels)
    return replace(options, levels=levels)


def _check_transports(config: Config, crew: Crew) -> None:
    """The placements, and what they quantize."""
    from parallel.placement import Placement

    options, levels = config.parallel, config.parallel.levels
    every = [options, *map(options.candidate, options.candidates)]
    quantizes = any(each.quantizes for each in every)
    _check_unread(options, quantizes)
    model = without_memory(config) if quantizes else None
    for each in every:
        placement = Placement.of(each, len(levels))
        if each.quantizes or config.offload.weights == "nvme":
            from parallel.mesh import Mesh
            from parallel.transport import Transport

            mesh = Mesh(levels)
            transport = Transport.of(each, mesh, placement)
            if model is not None:
                check_quantized(model, transport, crew.workers)
            if config.offload.weights == "nvme":
                _check_slots(mesh, placement, transport)


def _check_slots(mesh: "Mesh", placement: "Placement", transport: "Transport") -> None:
    """That a slot on drives can be the only place of a weight: as the engine does (`offload.placing`)."""
    from offload.placing import SLOT_APART

    kept, owned = (mesh.shard(mesh.world, levels) for levels in (placement.params, placement.optim))
    if kept != owned or any(transport.weights):
        raise ValueError(SLOT_APART)


def _check_unread(options: ParallelOptions, quantizes: bool) -> None:
    """What says how to quantize, where nothing is."""
    if not quantizes:
        _refuse_set(
            "parallel", options, ("exact", "weights_block", "grads_block"),
            "is only read where something is quantized: set parallel.quantize, parallel.weights_format or "
            "parallel.grads_format, or leave it out",
        )  # fmt: skip


def _refuse_set(section: str, options: Any, keys: Iterable[str], why: str) -> None:
    """ValueError for the first of `keys` that is not what it is by default."""
    for key in keys:
        if (value := getattr(options, key)) != getattr(type(options)(), key):
            raise ValueError(f"{section}.{key}={value} {why}")


def check_quantized(model: "LanguageModel", transport: "Transport", workers: int) -> None:
    """That there is something to quantize, in blocks that a shard can be cut into: as the engine does, but before
    anything is taken. model: without its memory."""
    if not transport.quantizes:
        return
    from fnmatch import fnmatchcase

    from parallel.cut import cut_units

    names = [name for name, _ in model.named_parameters()]
    for pattern in transport.exact:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"parallel.exact has {pattern!r}, which no parameter is called; there are {names[0]} to {names[-1]}"
            )
    units, root = cut_units(model, model.units())
    sizes = [
        sum(p.numel() for name, p in named if p.requires_grad and transport.allows(name, p.ndim))
        for named in (root, *(own for _, _, own in units))
    ]
    if not max(sizes):
        raise ValueError(
            f"parallel.exact={list(transport.exact)} leaves nothing to quantize; name less, or leave out "
            f"parallel.quantize, parallel.weights_format and parallel.grads_format"
        )
    transport.check_blocks(max(sizes), workers)


def without_memory(job: Job, dtype: "torch.dtype | None" = None) -> "LanguageModel":
    """The job's model on ``meta``; dtype: of compute, by default fp32."""
    import torch

    from trainer.data.tokenizer import open_tokenizer
    from trainer.models import build_model

    vocab_size, meta = open_tokenizer(job.data.tokenizer).vocab_size, torch.device("meta")
    dtype = dtype or torch.float32
    return build_model(job.model, vocab_size=vocab_size, seq_len=job.train.seq_len, dtype=dtype, device=meta)


def check_sequence(config: Config, levels: Mapping[str, int]) -> None:
    """That of `parallel.sequence.SequenceParallel`, for what is known without the model."""
    if not config.parallel.sequence:
        return
    if config.parallel.sequence not in levels:
        raise ValueError(f"parallel.sequence={config.parallel.sequence}: the levels are {', '.join(levels)}")
    size = levels[config.parallel.sequence]
    if isinstance(config.model, LlamaOptions) and config.model.num_heads % size:
        raise ValueError(
            f"parallel.sequence={config.parallel.sequence} has {size} ranks, which model.num_heads="
            f"{config.model.num_heads} must be divisible by; choose another level, or change parallel.levels"
        )
    if config.train.seq_len < size:
        raise ValueError(
            f"parallel.sequence={config.parallel.sequence} has {size} ranks, and each needs a token of "
            f"train.seq_len={config.train.seq_len}"
        )


def _check_engine(job: Job) -> None:
    """A setting that an engine cannot express would be ignored, and that is an error."""
    parallel = job.parallel
    if job.engine == "native":
        return
    possible = BASELINE_PLACEMENTS[job.engine]
    if parallel.placement not in possible:
        raise ValueError(
            f"parallel.placement={parallel.placement} needs engine=native; "
            f"engine={job.engine} has {', '.join(possible)}"
        )
    if parallel.quantizes:
        raise ValueError(
            f"parallel.quantize, weights_format and grads_format need engine=native; engine={job.engine} does not read "
            f"them"
        )
    if job.offload.away:
        raise ValueError(
            f"offload.states and offload.weights need engine=native; engine={job.engine} does not read them"
        )
    for key in UNREAD[job.engine]:
        if getattr(parallel, key) != getattr(ParallelOptions, key):
            raise ValueError(
                f"parallel.{key}={getattr(parallel, key)} needs engine=native; engine={job.engine} does not read it"
            )
    if parallel.candidates:
        raise ValueError(f"parallel.candidates need engine=native; engine={job.engine} does not try placements")
    if parallel.sequence:
        raise ValueError(f"parallel.sequence={parallel.sequence} needs engine=native; engine={job.engine} has none")
    if job.offload.activations.leave:
        raise ValueError(
            f"offload.activations.mode={job.offload.activations.mode} needs engine=native; engine={job.engine} has "
            f"keep and checkpoint"
        )
    if job.offload.activations.tile_tokens is not None:
        raise ValueError(
            f"offload.activations.tile_tokens={job.offload.activations.tile_tokens} needs engine=native; "
            f"engine={job.engine} does not read it"
        )
    if job.engine == "deepspeed" and parallel.levels:
        raise ValueError("parallel.levels is not read by engine=deepspeed; leave it empty, or set engine=native")


def _check_numbers(job: Job) -> None:
    """What a bad step needs: to be undone before it is accepted, or a version before it to go back to."""
    if job.train.on_bad_numbers == "rewind" and not (job.checkpoint.every_steps or job.checkpoint.snapshots):
        raise ValueError(
            "train.on_bad_numbers=rewind needs something to go back to: set checkpoint.snapshot_every_steps or "
            "checkpoint.every_steps"
        )
    if job.train.on_bad_numbers != "skip":
        return
    if job.engine == "deepspeed":
        raise ValueError(
            "train.on_bad_numbers=skip needs engine=native or fsdp2: DeepSpeed tells its norm only after the update"
        )
    if job.parallel.error_feedback and job.parallel.quantizes:
        raise ValueError(
            "train.on_bad_numbers=skip with parallel.error_feedback=true: what was rounded off a bad gradient would "
            "stay; set parallel.error_feedback=false, or train.on_bad_numbers=fail"
        )


def _check_offload(job: Job) -> None:
    """What would be ignored, or refused by the ranks."""
    options, drives = job.offload, ("nvme_path", "nvme_bytes", "nvme_tbw", "nvme_direct")
    idle = () if options.activations.swaps else ("threads",)
    unread = {"none": ("gpu_bytes", "host_bytes", *idle, *drives), "host": drives}.get(options.states, ())
    if options.activations.swaps and options.nvme_path:
        unread = tuple(key for key in unread if key not in drives)
    for key in unread:
        _refuse_set(
            "offload", options, (key,),
            f"is not read with offload.states={options.states}; leave it out, or choose other offload.states"
            + (", or offload.activations that swap and offload.nvme_path" if key in drives else ""),
        )  # fmt: skip
    if options.update == "speculate" and options.states == "nvme" and not options.host_bytes:
        raise ValueError(
            "offload.update=speculate with offload.states=nvme is for the states that offload.host_bytes has room for; "
            "set it, or leave offload.update out"
        )
    if options.away and job.optimizer.name != "adamw":
        raise ValueError(
            f"offload.states={options.states} updates by AdamW, not by optimizer={job.optimizer.name}; set "
            f"optimizer=adamw, or offload=none"
        )


def _check_idle(job: Job) -> None:
    """What the options beside it leave nobody to read."""
    optimizer, data, train, offload = job.optimizer, job.data, job.train, job.offload
    idle: list[tuple[str, Any, tuple[str, ...], bool, str]] = [
        ("optimizer", optimizer, ("momentum",), optimizer.name != "sgd", "optimizer=sgd"),
        ("optimizer", optimizer, ("beta1", "beta2", "eps"), optimizer.name != "adamw", "optimizer=adamw"),
        ("optimizer", optimizer, ("final_lr_ratio",), optimizer.schedule == "constant", "a schedule that decays"),
        ("data", data, ("column",), data.source in ("stdlib", "text"), "data.source=jsonl, parquet or datasets"),
        ("data", data, ("valid_fraction",), bool(data.valid_paths), "empty data.valid_paths"),
        ("train", train, ("rewinds",), train.on_bad_numbers != "rewind", "train.on_bad_numbers=rewind"),
        ("offload", offload, ("predict",), not offload.away, "other offload.states than none"),
        ("offload", offload, ("speculate_share",), offload.update != "speculate", "offload.update=speculate"),
        (
            "offload.activations",
            offload.activations,
            ("host_bytes",),
            not offload.activations.swaps,
            "offload.activations.mode=swap, input, auto, stream or stream_input",
        ),
        (
            "checkpoint",
            job.checkpoint,
            ("snapshot_hold_s",),
            not job.checkpoint.snapshots,
            "checkpoint.snapshot_every_steps",
        ),
    ]
    for section, options, keys, unread, reader in idle:
        if unread:
            _refuse_set(section, options, keys, f"is only read with {reader}; leave it out, or set that")


def _check_files(job: Job) -> None:
    """What the workers will open, where they run on this machine."""
    from checkpoint.persisted.folder import Folder
    from offload.drive import DriveError, check_writable
    from trainer.data.files import find_files

    if job.data.source != "datasets":
        find_files(job.data.paths, "data.paths")
        find_files(job.data.valid_paths, "data.valid_paths")
    tokenizer = Path(job.data.tokenizer).expanduser()
    if (tokenizer.suffix == ".json" or tokenizer.is_absolute()) and not tokenizer.exists():
        raise ValueError(f"data.tokenizer={job.data.tokenizer}: there is no such file or folder")
    if isinstance(job.model, HFOptions):
        job.model.config_file()
    try:
        for folder in job.offload.nvme_path:
            check_writable(Path(folder), job.offload.nvme_direct)
    except DriveError as error:
        raise ValueError(f"offload.nvme_path={error.filename}: {error.strerror}") from error
    if job.checkpoint.url:
        Folder.at(job.checkpoint.url).check_writable()


def _check_model(job: Job, device: str) -> None:
    """That the model can run by tiles, and its sequences be shared, where that is asked for."""
    activations = job.offload.activations
    tiled = activations.streams or activations.tile_tokens is not None
    if not tiled and (job.parallel.sequence_ranks == 1 or isinstance(job.model, LlamaOptions)):
        return
    import torch

    from parallel.sequence import SequenceParallel
    from trainer.build import run_by_tiles
    from trainer.workload import check_shared

    model = without_memory(job)
    run_by_tiles(activations, model, torch.float32 if job.train.dtype == "fp32" else torch.bfloat16, device)
    check_shared(job, model, SequenceParallel.pretended(job.parallel.sequence_ranks))


def _check_checkpoint(options: CheckpointOptions, crew: Crew) -> None:
    from checkpoint.snapshots.roster import check_nodes

    if options.snapshots:
        check_nodes(options, crew.nodes)
    elif options.parity is not None or options.group_nodes is not None:
        raise ValueError(
            "checkpoint.parity and checkpoint.group_nodes are of snapshots, of which checkpoint.snapshot_every_steps=0 "
            "takes none; set it, or leave them out"
        )
    if options.url.startswith("memory:") and crew.workers > 1:
        raise ValueError(
            f"checkpoint.url={options.url} lies in the memory of one process, but launch.workers={crew.workers}; "
            f"choose a folder or an object store"
        )
