"""What a run goes on from, and whether it may: it must be of the same model, training and data."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from checkpoint import CheckpointReader, Checkpoints
from checkpoint.snapshots.no_snapshots import NoSnapshots
from checkpoint.snapshots.rank import Snapshots
from checkpoint.snapshots.reader import SnapshotReader
from offload.state import MASTER
from parallel.optimizer import moment_kinds
from trainer.build import Rank
from trainer.changes import as_plain, changes, show
from trainer.run import RunFolder

Source = CheckpointReader | SnapshotReader


def find_source(
    run: RunFolder,
    checkpoints: Checkpoints,
    snapshots: Snapshots | NoSnapshots,
    where: Rank,
    newest_stored: int | None,
) -> Source | None:
    """What ``run.resume`` names, if there is any, in memory or storage. Rank 0 chooses it for all. Collective.

    newest_stored: checkpoints of later steps are passed over.
    """
    chosen, in_memory = torch.full((2,), -1)
    if where.rank == 0:
        memory = snapshots.steps()
        newest = math.inf if newest_stored is None else newest_stored
        stored = [step for step in checkpoints.steps() if step <= newest]
        if (step := run.resume_step(sorted({*memory, *stored}))) is not None:
            chosen, in_memory = torch.tensor([step, step in memory])
    if where.world > 1:
        dist.broadcast(chosen, src=0)
        dist.broadcast(in_memory, src=0)
    if chosen < 0:
        return None
    return snapshots.open(int(chosen)) if in_memory else checkpoints.open(int(chosen))


def check_source(reader: Source, run: RunFolder, data: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where `run` cannot go on from `reader`, or may not without ``run.on_change=accept``.

    data: the corpus' fingerprint. shapes: of the model's parameters, by name.
    """
    job = run.job
    _check_shapes(reader, run, shapes)
    _check_moments(reader, run)
    if reader.step > job.train.steps:
        raise ValueError(
            f"train.steps={job.train.steps}: {reader.step} steps of {run.checkpoint_url} are done; set as many at "
            f"least, or go on from an earlier one by run.resume=, or choose another run.name= or checkpoint.url="
        )
    if job.run.on_change == "accept":
        return
    if reader.meta["data"] != data:
        raise ValueError(
            f"the data is not what the run {job.run_name} was trained on until step {reader.step}: files behind "
            f"data.source={job.data.source} have changed; bring them back, or go on with run.on_change=accept"
        )
    training, _ = ([], []) if run.in_use() else changes(reader.meta["config"], as_plain(job))
    if training:
        raise ValueError(
            f"the checkpoints in {run.checkpoint_url} are of a run that was started with other options (then -> now):\n"
            f"{show(training)}\n"
            f"choose another checkpoint.url=, or go on from them with the new options by run.on_change=accept"
        )


def _check_shapes(reader: Source, run: RunFolder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """State is read by ranges of elements: those of a tensor of another shape would be taken for the parameter's."""
    there = {name: reader.shape(name, MASTER) for name in reader.names() if MASTER in reader.kinds(name)}
    for name in sorted({*shapes, *there}):
        if there.get(name) != shapes.get(name):
            raise ValueError(
                f"step {reader.step} of {run.checkpoint_url} is of another model, whose {name} is "
                f"{_size(there.get(name))}, where model.* asks for {_size(shapes.get(name))}; set the options of the "
                f"model as they were, or choose another run.name= or checkpoint.url="
            )


def _check_moments(reader: Source, run: RunFolder) -> None:
    """What another optimizer has left, also one whose change was accepted, is no state to begin with."""
    there = {kind for name in reader.names() for kind in reader.kinds(name)}
    for kind in moment_kinds(run.job.optimizer):
        if kind not in there:
            raise ValueError(
                f"step {reader.step} of {run.checkpoint_url} is of another optimizer, without the {kind} of "
                f"optimizer={run.job.optimizer.name}; set optimizer.* as it was, or choose another run.name= or "
                f"checkpoint.url="
            )


def _size(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else " x ".join(map(str, shape))
