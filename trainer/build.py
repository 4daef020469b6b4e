"""From a job to the things that train it: the device, the dtype, the model and the engine."""

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.ranks import Ranks
from checkpoint.snapshots.no_snapshots import NoSnapshots
from checkpoint.snapshots.process import local_roster
from checkpoint.snapshots.rank import Snapshots
from checkpoint.snapshots.roster import Roster
from offload.activations.stream import check_blocks
from offload.options import ActivationOptions
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.sequence import SequenceParallel
from trainer.data import Corpus
from trainer.job import Job
from trainer.models import LanguageModel
from trainer.run import RunFolder, run_id
from trainer.workload import check_shared

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is, and what it computes on."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls) -> "Rank":
        """From `torch.distributed` if a process group exists, else alone; on the current GPU if there is one."""
        gpu = torch.cuda.is_available()
        where = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), where)
        return cls(0, 1, where)

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank. Collective, on the hosts alone."""
        return self.sum(here)[0] > 0

    def sum(self, *here: float) -> list[float]:
        """Each over all ranks. Collective, on the hosts alone."""
        everywhere = torch.tensor(here, dtype=torch.float32)
        if self.world > 1:
            dist.all_reduce(everywhere)
        return everywhere.tolist()

    def gather(self, here: Any) -> list[Any]:
        """What each rank has, in their order. Collective."""
        if self.world == 1:
            return [here]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, here)
        return found

    def tell(self, here: Any) -> Any:
        """What rank 0 has. Collective."""
        told = [here]
        if self.world > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]


def choose_dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of compute, and why."""
    if asked == "fp32":
        return torch.float32, "asked for"
    if asked == "bf16":
        return torch.bfloat16, "asked for; fp32 master weights"
    if device.type == "cpu":
        return torch.float32, "bf16 is emulated or no faster on most CPUs"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32, "this GPU has no bf16"
    return torch.bfloat16, "the GPU has bf16; fp32 master weights"


def compiles(job: Job, device: torch.device) -> bool:
    """Whether the model's blocks are compiled."""
    return device.type == "cuda" if job.model.compile is None else job.model.compile


def run_by_tiles(
    options: ActivationOptions, model: LanguageModel, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Have `model` run by tiles as `options` say, but for its blocks, which the engine does. ValueError for a model, or
    a dtype of compute, that cannot."""
    if options.streams:
        check_blocks(options, model.blocks(), dtype, torch.device(device))
    model.run_by_tiles(options)


def build_engine(
    job: Job, model: LanguageModel, where: Rank, dtype: torch.dtype, say: Callable[[str], None] = log.info
) -> Engine:
    """The engine that `job.engine` names, around `model`, with its first weights. Collective.

    say: gets what the engine chooses while training.
    """
    activations = job.offload.activations
    run_by_tiles(activations, model, dtype, where.device)
    common: dict[str, Any] = {
        "units": model.units(),
        "initial": model.initial(job.train.seed, where.device),
        "optimizer": job.optimizer,
        "options": job.parallel,
        "dtype": dtype,
        "device": where.device,
        "recompute": model.blocks() if activations.mode == "checkpoint" else [],
        "compile": model.blocks() if compiles(job, where.device) else [],
    }
    if job.engine == "fsdp2":
        from parallel.fsdp2 import FSDP2Engine

        return FSDP2Engine(model, **common)
    if job.engine == "deepspeed":
        from parallel.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, clip_norm=job.train.clip_norm, **common)
    from parallel import Placement, shard

    mesh = mesh_of(job, where)
    placement = Placement.of(job.parallel, mesh.num_levels)
    micro, _ = job.micro_batches(where.world)
    most_tokens = micro * -(-job.train.seq_len // job.parallel.sequence_ranks)
    return shard(
        model, mesh, placement,
        offload=job.offload, blocks=model.blocks(), most_tokens=most_tokens, say=say, **common,
    )  # fmt: skip


def mesh_of(job: Job, where: Rank) -> Mesh:
    """The levels of ``parallel.levels``, as this rank sees them. ValueError where they do not make up the world."""
    return Mesh.of(job.parallel.levels, rank=where.rank, world=where.world)


def share_sequences(job: Job, model: LanguageModel, where: Rank) -> SequenceParallel:
    """The ranks that have the other tokens of this rank's sequences. Collective. ValueError where they cannot be
    shared."""
    if not job.parallel.sequence:
        return SequenceParallel(None, number=where.rank, count=where.world)
    sequence = SequenceParallel.of(mesh_of(job, where), job.parallel.sequence)
    check_shared(job, model, sequence)
    return sequence


def open_snapshots(
    job: Job,
    where: Rank,
    run: RunFolder,
    roster: Roster | None,
    group: dist.ProcessGroup | None,
    say: Callable[[str], None],
) -> Snapshots | NoSnapshots:
    """The snapshots in memory, as ``checkpoint.snapshot_every_steps`` wants them. Collective.

    Without a roster all ranks must be on this machine; ValueError where they are not.
    """
    if not job.checkpoint.snapshots:
        return NoSnapshots()
    ranks = Ranks(where.rank, where.world, group)
    if roster is None:
        hosts = [host.decode() for host in ranks.gather(socket.gethostname().encode())]
        found, hold_s = b"", job.checkpoint.snapshot_hold_s
        if where.rank == 0 and len(set(hosts)) == 1:
            log = run.path / "logs" / "snapshots.log"
            found = local_roster(run_id(job), where.world, hold_s=hold_s, say=say, log=log).dumps()
        found = ranks.tell(found)
        if not found:
            raise ValueError("checkpoint.snapshot_every_steps: ranks on several machines need a roster of processes")
        roster = Roster.loads(found)
    return Snapshots(roster, job.checkpoint, ranks, say)


def check_same_data(corpus: Corpus, where: Rank) -> None:
    """ValueError where this rank's tokens are not those of rank 0: other files, or another interpreter's library."""
    fingerprints = where.gather(corpus.fingerprint)
    if corpus.fingerprint != fingerprints[0]:
        raise ValueError(
            f"the data on rank {where.rank} is not that of rank 0: give every node the same files (data.paths) and, "
            f"for data.source=stdlib, the same Python"
        )
