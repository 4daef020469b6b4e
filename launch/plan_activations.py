"""What ``atoll plan`` says of activations: what each thing that blocks may do takes, and the α that would be chosen."""

from dataclasses import replace

import torch

from launch.config import Config
from launch.plan import Planned
from offload.activations_plan import choose
from offload.options import ActivationOptions
from parallel.planning.machine import Machine
from trainer.footprint import Footprint, alternatives, footprint

LINK_BYTES_PER_S = 50e9
"""Each way between a GPU and host memory while both are busy: PCIe 5 x16 (docs/activations.md)."""
STATE_BYTES = 14
"""A parameter, in host memory with ``offload.states=host`` (docs/offload.md)."""


def activation_rows(config: Config, planned: Planned) -> list[str]:
    """A table; the row with an asterisk is the job's."""
    work, machine, options = planned.work, planned.machine, config.offload.activations
    micro, _ = config.micro_batches(planned.candidate.plan.mesh.world)
    dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
    found = footprint(
        config.job(),
        vocab_size=_vocab_size(config),
        micro_batch_size=micro,
        num_tokens=config.train.seq_len,
        dtype=dtype,
    )
    alpha, why = chosen_alpha(config, planned, found)
    rows = alternatives(options, alpha)
    auto = f"offload.activations=auto (α = {alpha:.2f})"
    if options.mode == "auto" or (options.mode == "swap" and options.alpha is None):
        mine = auto
    else:
        mine = next((text for text, one, _ in rows if _same(one, options)), "as configured")
    if mine == "as configured":
        rows.insert(0, (mine, options, options.alpha or 0.0))
    rows.append((auto, replace(options, mode="auto", alpha=None), alpha))
    width = max(len(text) for text, _, _ in rows) + 4
    lines = [f"{'activations of a micro-batch':{width}}{machine.tier + ', GiB':>12}{'host, GiB':>12}"]
    for text, one, a in rows:
        device, host = found.device_bytes(one, a) / 2**30, found.host_bytes(one, a) / 2**30
        lines.append(f"{'*' if text == mine else ' '} {text:{width - 2}}{device:12.3f}{host:12.3f}")
    return [*lines, f"  {why}"]


def chosen_alpha(config: Config, planned: Planned, found: Footprint) -> tuple[float, str]:
    """What ``auto`` would choose by the machine's rates, and why; a run measures instead."""
    work, machine, options = planned.work, planned.machine, config.offload.activations
    block = max(work.row, key=lambda unit: unit.forward_flops * unit.count)
    cost = found.cost(work.tokens * block.forward_flops / machine.compute)
    rate = link_rate(machine)
    host = options.host_bytes or machine.memory.get("host")
    if host is not None and not options.host_bytes and config.offload.states == "host":
        host = max(0.0, host - STATE_BYTES * work.numel / planned.candidate.plan.mesh.world)
    choices = choose(
        [cost] * found.num_blocks,
        link_bytes_per_s=rate,
        host_bytes=None if host is None else int(host),
        keep_last=min(options.keep_last, found.num_blocks),
    )
    away = [choice for choice in choices if choice.mode != "keep"]
    alpha = away[0].alpha if away else 0.0
    hides = rate * cost.forward_s
    why = (
        f"α = {alpha:.2f}: a block computes {1e3 * cost.forward_s:.3g} ms forward, in which {hides / 1e9:.3g} GB leave "
        f"at {rate / 1e9:.0f} GB/s, of {cost.least_bytes / 1e9:.3g} GB and α times {cost.rest_bytes / 1e9:.3g} GB"
    )
    if inputs := sum(choice.mode == "input" for choice in away):
        why += f"; host memory does not hold inputs and attention: {inputs} blocks swap their input alone"
    if recomputed := sum(choice.mode == "recompute" for choice in away):
        why += f"; it does not hold the inputs of {recomputed} more: they are recomputed"
    return alpha, why


def link_rate(machine: Machine) -> float:
    """Between where a rank computes and host memory; without a GPU a copy in memory."""
    return LINK_BYTES_PER_S if machine.tier == "gpu" else machine.memory_rate / 2


def _same(a: ActivationOptions, b: ActivationOptions) -> bool:
    keys = ("mode", "alpha") if a.mode in ("keep", "recompute", "checkpoint") else ("mode", "alpha", "keep_last")
    return all(getattr(a, key) == getattr(b, key) for key in keys)


def _vocab_size(config: Config) -> int:
    from trainer.data.tokenizer import open_tokenizer

    return open_tokenizer(config.data.tokenizer).vocab_size
