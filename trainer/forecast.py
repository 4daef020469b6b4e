"""What a step should take while states are away from the device: said before the first, and compared with what it took.

The machine's rates and the time of a block are measured once and kept in the run's folder (``profile.json``), so that a
resumed run goes on as it was: ``offload.states=auto`` is then what it was before. All ranks measure at the same time,
and reckon with the slowest of them.
"""

import json
import os
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from offload.arena import capacity_bytes
from offload.choose import Chosen, MemoryBudget, choose, overrides
from offload.cost import Layer, Prediction, Rates, predict, seconds
from offload.device import host_available_bytes
from offload.measure import measure
from offload.mounts import space_of
from offload.nvme import endurance
from offload.options import OffloadOptions
from parallel.offloaded import num_threads, ranks_here
from parallel.planning.away import Seconds, layers_of
from parallel.planning.cost import memory
from parallel.planning.workload import UnitCost
from parallel.sequence import SequenceParallel
from trainer.build import Rank
from trainer.changes import as_plain
from trainer.fit_activations import reckoned
from trainer.job import Job
from trainer.loggers import replace_file
from trainer.models import LanguageModel
from trainer.probe import Probed, probe, release, sending_s

Made = TypeVar("Made")
FILE = "profile.json"
SKIPPED, SHOWN = 3, 10
"""Steps that are not compared (blocks compile, memory settles), and how many more until the first comparison."""
FREE_HOST, FREE_NVME = 0.85, 0.95
"""Of what is free, how much ``auto`` plans with."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured, and the memory there was."""

    probed: Probed
    rates: Rates
    room: MemoryBudget


class Forecast:
    """The predicted step beside the measured ones."""

    def __init__(self, prediction: Prediction, job: Job, *, world: int, here: int) -> None:
        """here: ranks of this machine, of `world`."""
        self.prediction, self._options, self._world, self._here = prediction, job.offload, world, here
        self._clip, self._shared = job.train.clip_norm, job.parallel.sequence_ranks > 1
        self._norms: deque[float] = deque(maxlen=2)
        self._skip = SKIPPED
        self._ratios: list[float] = []
        self._times: list[float] = []

    def announce(self) -> str:
        """The prediction, and what it means for the drives."""
        shared = " but for attention" if self._shared else ""
        alone = "" if self._world == 1 else f", without what ranks send each other{shared}"
        worn = wear(self.prediction.written_bytes / self.prediction.step_s, self._options, ranks=self._here)
        return "\n".join(filter(None, (f"predicted: {self.prediction}{alone}", worn)))

    def seen(self, step_s: float, grad_norm: float) -> str:
        """Take note of a step; what to say of it, mostly nothing."""
        clipped = self._clip is not None and any(norm > self._clip for norm in self._norms)
        self._norms.append(grad_norm)
        if self._skip:
            self._skip -= 1
            return ""
        expected_s = self.prediction.clipped_step_s if clipped else self.prediction.step_s
        self._times.append(step_s)
        self._ratios.append(step_s / expected_s)
        return self._compare() if len(self._times) == SHOWN else ""

    def summary(self) -> str:
        """For the end of the run; empty where it was too short to tell."""
        return self._compare() if self._times else ""

    @property
    def ratio(self) -> float:
        """Measured over predicted, the median of the steps seen. At least one was."""
        return statistics.median(self._ratios)

    def _compare(self) -> str:
        count, median = len(self._times), statistics.median(self._times)
        return f"measured: {seconds(median)} a step (median of {count}), {self.ratio:.2f} of what was predicted"


def wear(bytes_per_s: float, options: OffloadOptions, *, ranks: int) -> str:
    """What it means for the drives of ``offload.nvme_path`` that each of a machine's ranks writes so much to them.
    Empty where nothing is written."""
    if not bytes_per_s:
        return ""
    _, capacity = space_of([Path(path) for path in options.nvme_path])
    said = endurance(ranks * bytes_per_s, 1.0, capacity_bytes=capacity, tbw=options.nvme_tbw)
    return f"drives: {f'each machine, of {ranks} ranks, ' if ranks > 1 else ''}{said}"


def settle(
    job: Job,
    model: LanguageModel,
    where: Rank,
    dtype: torch.dtype,
    folder: Path,
    say: Callable[[str], None],
    *,
    sequence: SequenceParallel,
    activation_bytes: int | None = None,
) -> tuple[Job, Forecast | None]:
    """The job with a tier in the place of ``offload.states=auto``, and its forecast; None where nothing is predicted.
    Collective.

    model: on ``meta``. sequence: the ranks that share this one's sequences. activation_bytes: what activations take of
    the device, where it is counted: what is measured knows it of blocks that keep or recompute, but not of those that
    swap.
    ValueError where ``auto`` finds nothing that fits, or cannot tell.
    """
    options = job.offload
    if not options.away or not options.predict:
        return job, None
    needed, cannot = options.states == "auto", ""
    if job.engine != "native":
        cannot = f"with engine={job.engine} it is not reckoned"
    elif job.optimizer.name != "adamw":
        cannot = f"optimizer={job.optimizer.name} is not updated away from the device"
    if cannot and needed:
        raise ValueError(f"offload.states=auto: {cannot}; choose offload=host or nvme")
    if cannot:
        return job, None
    plan = _Reckoning(job, model, where, dtype, activation_bytes)
    key = _key(job, where, dtype)
    known = where.tell(_load(folder / FILE, key) if where.rank == 0 else None)
    if known is None:
        found = plan.measure()
        profiles = where.gather(found)
        if failed := next((text for text in profiles if isinstance(text, str)), None):
            if needed:
                raise ValueError(f"offload.states=auto: this machine could not be measured: {failed}")
            say(f"the time of a step is not predicted: {failed}")
            return job, None
        profile = _slowest([p for p in profiles if isinstance(p, Profile)])
        profile = replace(profile, probed=plan.among(sequence, profile.probed))
    else:
        profile, options = known
        if needed:
            say(f"offload.states=auto: {overrides(options)}, as when this run began")
    if options.states == "auto":
        chosen = plan.choose(profile)
        options = chosen.options
        if options.activations.mode == "auto":  # which reads it too
            options = replace(options, device_bytes=job.offload.device_bytes)
        say(f"offload.states=auto: {chosen.why}")
    if where.rank == 0 and known is None:
        replace_file(folder / FILE, json.dumps({"key": key, **_plain(profile), "offload": asdict(options)}, indent=1))
    job = replace(job, offload=options)
    forecast = Forecast(plan.predict(profile, options), job, world=where.world, here=ranks_here())
    say(forecast.announce())
    return job, forecast


class _Reckoning:
    """One rank's part of a job as the cost model sees it."""

    def __init__(
        self, job: Job, model: LanguageModel, where: Rank, dtype: torch.dtype, activation_bytes: int | None
    ) -> None:
        self._job, self._where, self._dtype, self._model = job, where, dtype, model
        self.work, self._traffic = reckoned(job, model, where, dtype, activation_bytes=activation_bytes)
        blocks = set(model.blocks())
        self._blocks = {name for name, module in model.named_modules() if module in blocks}
        self._num_blocks = len(blocks)

    def measure(self) -> "Profile | str":
        """This rank's own, or what went wrong. Collective: no rank leaves the others waiting."""
        options, where = self._job.offload, self._where
        here, threads = ranks_here(), num_threads(options)
        probed, room = self._attempt(self._probe), self._attempt(lambda: _room(options, where.device, here))
        if where.world > 1:
            dist.barrier()  # then all measure at once, and take of what is free
        if isinstance(probed, str):
            return probed
        if isinstance(room, str):
            return room
        parts = [part for layer in self._layers(lambda _: (0.0, 0.0)) for part in layer.parts]
        return self._attempt(
            lambda: Profile(
                probed=probed,
                rates=measure(parts, options, device=where.device, threads=threads, nvme_bytes=room.nvme_bytes),
                room=room,
            )
        )

    def _probe(self) -> Probed:
        return probe(
            self._job,
            micro_batch_size=self._job.micro_batches(self._where.world)[0],
            vocab_size=self._model.vocab_size,
            dtype=self._dtype,
            device=self._where.device,
        )

    def among(self, sequence: SequenceParallel, probed: Probed) -> Probed:
        """What was probed alone, as it is among the ranks that share sequences, the slowest of all. Collective."""
        if (block := self.work.block).exchange is None:
            return probed
        micro, _ = self._job.micro_batches(self._where.world)
        mine = sending_s(self._job, self._model, sequence, micro, self._dtype, self._where.device)
        slowest = max(self._where.gather(mine))
        return replace(
            probed,
            block_forward_s=probed.block_forward_s + slowest,
            block_backward_s=probed.block_backward_s + block.passes_backward * slowest,
        )

    def _attempt(self, act: Callable[[], Made]) -> Made | str:
        """What `act` returns, or its error in words."""
        try:
            return act()
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            failed = f"{type(error).__name__}: {error}"
        release(self._where.device)  # not before: the error held what was in use
        return failed

    def predict(self, profile: Profile, options: OffloadOptions) -> Prediction:
        layers = self._layers(self._times(profile.probed))
        return predict(layers, options, profile.rates, micro_batches=self.work.micro_batches)

    def choose(self, profile: Profile) -> Chosen:
        sizes, probed = memory(self.work, self._traffic), profile.probed
        layers, rest = self._layers(self._times(probed)), sizes["activations"]
        if probed.block_bytes is not None and probed.rest_bytes is not None and self.work.activation_bytes is None:
            rest = probed.rest_bytes
            layers = [
                replace(layer, held_bytes=int(probed.block_bytes)) if unit.name in self._blocks else layer
                for layer, unit in zip(layers, self.work.all, strict=True)
            ]
        return choose(
            layers, self._job.offload, profile.rates, profile.room,
            micro_batches=self.work.micro_batches, activation_bytes=rest + sizes["communication buffers"],
        )  # fmt: skip

    def _layers(self, times: Seconds) -> list[Layer]:
        return layers_of(self.work, self._traffic, times)

    def _times(self, probed: Probed) -> Seconds:
        last = self.work.units[-1]

        def times(unit: UnitCost) -> tuple[float, float]:
            if unit.name in self._blocks:
                return probed.block_forward_s, probed.block_backward_s
            return (probed.rest_forward_s, probed.rest_backward_s) if unit is last else (0.0, 0.0)

        return times


def _room(options: OffloadOptions, device: torch.device, ranks: int) -> MemoryBudget:
    """What this rank may use. ranks: of this machine, which share it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = torch.cuda.get_per_process_memory_fraction(device) * total
        device_bytes = min(free + torch.cuda.memory_reserved(device), allowed)
    else:
        device_bytes = host_available_bytes() / ranks
    host_bytes = FREE_HOST * capacity_bytes() / ranks
    drives = FREE_NVME * space_of([Path(path) for path in options.nvme_path])[0] / ranks
    return MemoryBudget(
        device_bytes=device_bytes if options.device_bytes is None else options.device_bytes,
        host_bytes=host_bytes if options.host_bytes is None else options.host_bytes,
        nvme_bytes=drives if options.nvme_bytes is None else min(drives, options.nvme_bytes),
    )


def _slowest(profiles: list[Profile]) -> Profile:
    """What all ranks can count on."""

    def worst(parts: list[Any], pick: Callable[[list[float]], float]) -> Any:
        values = {item.name: [getattr(part, item.name) for part in parts] for item in fields(parts[0])}
        known = {name: None if None in found else pick(found) for name, found in values.items()}
        return type(parts[0])(**known)

    return Profile(
        probed=worst([profile.probed for profile in profiles], max),
        rates=replace(worst([profile.rates for profile in profiles], min), shared=profiles[0].rates.shared),
        room=worst([profile.room for profile in profiles], min),
    )


def _key(job: Job, where: Rank, dtype: torch.dtype) -> dict[str, Any]:
    """What a profile is good for. Through JSON, as it comes back."""
    device = torch.cuda.get_device_name(where.device) if where.device.type == "cuda" else "cpu"
    plain = {name: as_plain(job)[name] for name in ("model", "optimizer", "parallel", "offload", "train")}
    for name in ("steps", "eval_every_steps", "eval_sequences", "sample_tokens", "seed"):
        plain["train"].pop(name)
    key = plain | {"world": where.world, "dtype": str(dtype), "device": device, "cores": len(os.sched_getaffinity(0))}
    key["rates"] = [item.name for item in fields(Rates)]  # of another version, others were measured
    agreed: dict[str, Any] = json.loads(json.dumps(key))
    return agreed


def _plain(profile: Profile) -> dict[str, Any]:
    return {item.name: asdict(getattr(profile, item.name)) for item in fields(Profile)}


def _load(file: Path, key: dict[str, Any]) -> tuple[Profile, OffloadOptions] | None:
    """What was measured for the same job on the same machine, and the options then; None where there is nothing."""
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if found["key"] != key:
        return None
    profile = Profile(
        probed=Probed(**found["probed"]), rates=Rates(**found["rates"]), room=MemoryBudget(**found["room"])
    )  # fmt: skip
    activations = type(OffloadOptions().activations)(**found["offload"].pop("activations"))
    return profile, OffloadOptions(**found["offload"], activations=activations)
