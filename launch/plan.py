"""What ``atoll plan`` prints: does it fit, how long is a step, what limits it. Needs neither a GPU nor Ray.

The figures are those of `parallel.planning` for the placement that is configured, or for the one that
``parallel=auto`` picks.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from launch.checks import check_quantized, check_sequence, without_memory
from launch.config import Config
from launch.plan_activations import ActivationPlan, plan_activations
from offload.nvme import endurance
from parallel.mesh import Mesh
from parallel.options import QUANTIZE
from parallel.placement import Placement
from parallel.planning.away import AwayPlan, plan_away
from parallel.planning.choose import MEASURED, Candidate, Choice, choose, preset_of
from parallel.planning.cost import KINDS, Plan, estimate
from parallel.planning.machine import PRESETS, Machine, load_machine
from parallel.planning.simulate import simulate
from parallel.planning.workload import Workload
from parallel.transport import Transport
from trainer.progress import plural

if TYPE_CHECKING:
    from trainer.models import LanguageModel

HEADROOM = 0.92
"""The part of a tier's memory that a plan may fill: the rest is the driver's, the allocator's and the collectives'."""


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made for."""

    work: Workload
    machine: Machine
    candidate: Candidate
    choice: Choice | None
    """Where ``parallel=auto`` chose it."""
    cap_bytes: float
    tokens: int
    """A step, on all ranks together."""
    flops_per_token: int
    """Model FLOPs, without recomputation."""
    activations: ActivationPlan | None
    """None for a model that is not run for it."""
    away: AwayPlan | None = None
    """Where states or weights leave the device."""
    tbw: float | None = None
    """``offload.nvme_tbw``."""

    @property
    def written_bytes(self) -> float:
        """To drives by one rank, a step: states and activations."""
        states = self.away.prediction.written_bytes if self.away else 0
        return states + (self.activations.written_bytes * self.work.micro_batches if self.activations else 0)


def named_machine(config: Config) -> Machine:
    """The machine of ``machine=``. ValueError where it is needed and not named, or not known."""
    if config.machine:
        return load_machine(config.machine)
    if (config.launch.workers or 1) == 1:
        return load_machine("single")
    raise ValueError(
        f"machine= is empty: name what the {config.launch.workers} workers run on ({', '.join(sorted(PRESETS))}), or "
        f"the file that benchmarks/links.py writes"
    )


def settle(config: Config, workers: int) -> tuple[Config, str]:
    """Put a placement in the place of ``parallel=auto``; the config, and a sentence that says why this one."""
    if config.parallel.placement != "auto":
        return config, ""
    config = replace(config, launch=replace(config.launch, workers=workers))
    planned = plan(config, named_machine(config))
    assert planned.choice is not None
    found, mesh = planned.candidate, planned.candidate.plan.mesh
    names = [one.name for one in planned.choice.contenders[:MEASURED]]
    measured = names if config.parallel.auto_steps and len(names) > 1 else []
    parallel = replace(
        config.parallel.candidate(found.name),
        auto_steps=config.parallel.auto_steps if measured else 0,
        candidates=measured,
        levels=dict(zip(mesh.names, mesh.sizes, strict=True)),
    )
    trying = f"; tried at the start, too near to tell: {', '.join(measured)}" if measured else ""
    return replace(config, parallel=parallel), planned.choice.why + trying


def plan(config: Config, machine: Machine) -> Planned:
    """Plan a job on a machine; with ``parallel=auto`` choose its placement too.

    ValueError where nothing fits, or where the levels are not the machine's.
    """
    world = config.launch.workers or 1
    levels = config.parallel.levels or machine.levels(world) or {"worker": world}
    mesh = Mesh.of(levels, rank=0, world=world)
    check_sequence(config, levels)
    config = replace(config, parallel=replace(config.parallel, levels=levels))
    memory = machine.memory.get(machine.tier, math.inf)
    cap_gib, options = config.parallel.memory_gib, config.parallel
    cap_bytes = HEADROOM * memory if cap_gib is None else cap_gib * 2**30
    bf16 = config.train.dtype == "bf16" or (config.train.dtype == "auto" and machine.tier == "gpu")
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = without_memory(config, dtype)
    work, activations = _read_workload(config, model, dtype, machine, mesh, config.offload.device_bytes or cap_bytes)
    choice = None
    if options.placement == "auto":
        allowed = _quantizations(config, model, mesh)
        choice = choose(work, mesh, machine, cap_bytes=cap_bytes, quantize=allowed, options=options)
        candidate = choice.best
    else:
        placement = Placement.of(options, mesh.num_levels)
        made = Plan(mesh, placement, Transport.of(options, mesh, placement))
        check_quantized(model, made.transport, world)
        candidate = Candidate(made, options.quantize, estimate(work, made, machine), simulate(work, made, machine))
    away = None
    if config.offload.away:
        simulation = candidate.simulation
        waits_s = simulation.step_s - simulation.compute_s if simulation else 0.0
        away = plan_away(work, candidate.plan, machine, config.offload, cap_bytes=cap_bytes, waits_s=waits_s)
    tokens, flops = config.train.global_batch_size * config.train.seq_len, model.flops_per_token(config.train.seq_len)
    return Planned(
        work, machine, candidate, choice, cap_bytes, tokens, flops, activations, away, config.offload.nvme_tbw
    )


def _quantizations(config: Config, model: "LanguageModel", mesh: Mesh) -> tuple[str, ...]:
    """The values of ``parallel.quantize`` that ``parallel=auto`` may take: of those that it was not told to, only what
    the engine would not refuse."""
    asked, allowed = config.parallel.quantize, ["none"]
    for name in QUANTIZE[1:-1] if asked == "auto" else (asked,):
        options = config.parallel.candidate(f"zero3+{name}")
        try:
            check_quantized(model, Transport.of(options, mesh, Placement.of(options, mesh.num_levels)), mesh.world)
        except ValueError:
            if asked != "auto":
                raise
        else:
            allowed.append(name)
    return tuple(allowed) if asked == "auto" else (asked,)


def _read_workload(
    config: Config, model: "LanguageModel", dtype: torch.dtype, machine: Machine, mesh: Mesh, cap_bytes: float
) -> tuple[Workload, ActivationPlan | None]:
    """The job's numbers, and what its activations take. model: on ``meta``. dtype: of compute. cap_bytes: of the
    device's memory, what may be used."""
    from trainer.build import run_by_tiles
    from trainer.workload import workload_of

    run_by_tiles(config.offload.activations, model, dtype, "cuda" if machine.tier == "gpu" else "cpu")
    work = workload_of(config, model, mesh.world, compute_bytes=dtype.itemsize)
    activations = plan_activations(config, work, machine, mesh, cap_bytes)
    if activations:
        job = replace(config, offload=config.offload.with_activations(activations.settled))
        work = workload_of(job, model, mesh.world, compute_bytes=work.compute_bytes)
        work = replace(work, activation_bytes=activations.device_bytes)
    return work, activations


def show(planned: Planned) -> str:
    """The plan as text: a table of memory, a table of levels, and what limits the step."""
    candidate, machine, work = planned.candidate, planned.machine, planned.work
    made, cost, simulation = candidate.plan, candidate.cost, candidate.simulation
    assert simulation is not None
    mesh = made.mesh
    named = preset_of(made.placement, mesh.num_levels) or "free"
    away = planned.away
    step_s = away.step_s if away else simulation.step_s
    rate = planned.tokens / mesh.world / step_s
    model_rate = rate * planned.flops_per_token
    shared = f", of sequences that {work.shared.ranks} ranks share over {work.shared.level}" if work.shared else ""
    lines = [
        f"machine    {machine.name}, {plural(mesh.world, 'rank')}: {mesh}",
        f"placement  {named}: {made.placement.describe(mesh.names)}",
        f"transport  {made.transport.describe(mesh.names)}",
        f"step       {plural(work.micro_batches, 'micro-batch', 'es')} of {work.tokens:,} tokens a rank{shared}",
        "",
        *(away.rows() if away else _memory_rows(planned)),
        "",
        *_level_rows(planned),
        "",
        f"{'on device ' if away else 'step      '} {_seconds(simulation.step_s)} "
        f"({_seconds(cost.step_s)} by the closed form): compute "
        f"{_seconds(simulation.compute_s)}, waiting {_seconds(simulation.step_s - simulation.compute_s)}",
        f"speed      {rate:,.0f} tokens/s a rank, {model_rate / 1e12:.1f} TFLOP/s a rank, "
        f"{rate * mesh.world:,.0f} tokens/s in all",
        f"bottleneck {away.prediction.bottleneck if away and not away.waits else simulation.bottleneck}",
    ]
    if planned.written_bytes:
        here = machine.ranks_of_node(dict(zip(mesh.names, mesh.sizes, strict=True)))
        who = f"each node, of {here} ranks, " if here > 1 else ""
        lines.append(f"endurance  {who}{endurance(here * planned.written_bytes, step_s, tbw=planned.tbw)}")
    if planned.choice:
        lines.append(f"chosen     {planned.choice.why}; {planned.choice.fitting} of {planned.choice.total} fit")
    return "\n".join(lines)


def _memory_rows(planned: Planned) -> list[str]:
    machine, cost = planned.machine, planned.candidate.cost
    rows = [f"{'memory a rank':24}{machine.tier + ', GiB':>12}"]
    rows += [f"  {kind:22}{cost.memory[kind] / 2**30:12.3f}" for kind in KINDS]
    total, cap = cost.memory_bytes, planned.cap_bytes
    fits = "" if math.isinf(cap) else f"  of {cap / 2**30:.1f}"
    over = f": does NOT fit, {(total - cap) / 2**30:.1f} GiB too much" if total > cap else ""
    return [*rows, f"  {'in all':22}{total / 2**30:12.3f}{fits}{over}"]


def _level_rows(planned: Planned) -> list[str]:
    """Per level: bytes a rank sends by phase, what a member of the level sends, and how long the level is busy."""
    candidate, mesh = planned.candidate, planned.candidate.plan.mesh
    sent, simulation = candidate.cost.sent, candidate.simulation
    assert simulation is not None
    own = ("gather", "reduce", *(["sequence"] if planned.work.shared else []))
    heads = (*own, "once a step", "a rank", "a member", "busy")
    rows = [f"{'sent a step, GB':16}" + "".join(f"{head:>13}" for head in heads)]
    for i, name in enumerate(mesh.names):
        once = sum(sent[phase][i] for phase in ("reduce_last", "refresh", "control"))
        total = sum(by_level[i] for by_level in sent.values())
        member = total * math.prod(mesh.sizes[i + 1 :])
        values = [*(sent[phase][i] for phase in own), once, total, member]
        rows.append(
            f"  {name:14}" + "".join(f"{v / 1e9:13.4g}" for v in values) + f"{_seconds(simulation.levels_s[name]):>13}"
        )
    return rows


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
