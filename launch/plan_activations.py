"""What ``atoll plan`` says of activations: what each thing that blocks may do takes, and the α that would be chosen.

Its figure of the job's own choice is the one that the table of memory and ``parallel=auto`` reckon with.
"""

import logging
from dataclasses import dataclass, replace

import torch

from launch.config import Config
from offload.activations_plan import choose
from offload.options import ActivationOptions
from parallel.planning.machine import Machine
from parallel.planning.workload import Workload
from trainer.footprint import Footprint, alternatives, footprint

log = logging.getLogger(__name__)
LINK_BYTES_PER_S = 50e9
"""Each way between a GPU and host memory while both are busy: PCIe 5 x16 (docs/activations.md)."""
STATE_BYTES = 14
"""A parameter, in host memory with ``offload.states=host`` (docs/offload.md)."""


@dataclass(frozen=True)
class ActivationPlan:
    footprint: Footprint
    asked: ActivationOptions
    auto: ActivationOptions
    """What ``auto`` would come to by the machine's rates; a run measures instead."""
    why: str

    @property
    def settled(self) -> ActivationOptions:
        """What the job's blocks do."""
        return self.auto if self.asked.chooses else self.asked

    @property
    def device_bytes(self) -> int:
        return self.footprint.device_bytes(self.settled)

    def rows(self, tier: str) -> list[str]:
        """A table; the row with an asterisk is the job's."""
        rows = alternatives(self.asked)
        auto = "offload.activations=auto (" + (
            f"α = {self.auto.alpha:.2f})" if self.auto.alpha is not None else f"{self.auto.mode})"
        )
        if self.asked.chooses:
            mine = auto
        else:
            mine = next((text for text, one in rows.items() if _same(one, self.asked)), "as configured")
        rows = {mine: self.settled, **rows, auto: self.auto} if mine == "as configured" else {**rows, auto: self.auto}
        width = max(map(len, rows)) + 4
        lines = [f"{'activations of a micro-batch':{width}}{tier + ', GiB':>12}{'host, GiB':>12}"]
        for text, one in rows.items():
            device, host = self.footprint.device_bytes(one) / 2**30, self.footprint.host_bytes(one) / 2**30
            lines.append(f"{'*' if text == mine else ' '} {text:{width - 2}}{device:12.3f}{host:12.3f}")
        return [*lines, f"  {self.why}"]


def plan_activations(config: Config, work: Workload, machine: Machine, world: int) -> ActivationPlan | None:
    """None, and a warning, for a model that fake tensors do not run: then there are the estimates of `work` alone."""
    micro, _ = config.micro_batches(world)
    try:
        found = footprint(
            config.job(),
            vocab_size=_vocab_size(config),
            micro_batch_size=micro,
            num_tokens=config.train.seq_len,
            dtype=torch.bfloat16 if work.compute_bytes == 2 else torch.float32,
        )
    except Exception as error:
        log.warning("activations are estimated from layers' widths alone: %s: %s", type(error).__name__, error)
        return None
    return ActivationPlan(found, config.offload.activations, *_auto(config, work, machine, world, found))


def _auto(
    config: Config, work: Workload, machine: Machine, world: int, found: Footprint
) -> tuple[ActivationOptions, str]:
    """What ``auto`` would come to, and why."""
    options = config.offload.activations
    block = max(work.row, key=lambda unit: unit.forward_flops * unit.count)
    cost = found.cost(work.tokens * block.forward_flops / machine.compute)
    rate = link_rate(machine)
    host = options.host_bytes or machine.memory.get("host")
    if host is not None and not options.host_bytes and config.offload.states == "host":
        host = max(0.0, host - STATE_BYTES * work.numel / world)
    choices = choose(
        [cost] * found.num_blocks,
        link_bytes_per_s=rate,
        host_bytes=None if host is None else int(host),
        keep_last=min(options.keep_last, found.num_blocks),
    )
    away = [choice for choice in choices if choice.mode != "keep"]
    mode, alpha = (away[0].mode, away[0].alpha) if away else ("keep", 0.0)
    hides = rate * cost.forward_s
    why = (
        f"α = {alpha:.2f}: a block computes {1e3 * cost.forward_s:.3g} ms forward, in which {hides / 1e9:.3g} GB leave "
        f"at {rate / 1e9:.0f} GB/s, of {cost.least_bytes / 1e9:.3g} GB and α times {cost.rest_bytes / 1e9:.3g} GB"
    )
    if inputs := sum(choice.mode == "input" for choice in away):
        why += f"; host memory does not hold inputs and attention: {inputs} blocks swap their input alone"
    if recomputed := sum(choice.mode == "recompute" for choice in away):
        why += f"; it does not hold the inputs of {recomputed} blocks: they are recomputed"
    return replace(options, mode=mode, alpha=alpha if mode == "swap" else None), why


def link_rate(machine: Machine) -> float:
    """Between where a rank computes and host memory; without a GPU a copy in memory."""
    return LINK_BYTES_PER_S if machine.tier == "gpu" else machine.memory_rate / 2


def _same(a: ActivationOptions, b: ActivationOptions) -> bool:
    keys = ("mode", "alpha", "keep_last") if a.swaps else ("mode",)
    return all(getattr(a, key) == getattr(b, key) for key in keys)


def _vocab_size(config: Config) -> int:
    from trainer.data.tokenizer import open_tokenizer

    return open_tokenizer(config.data.tokenizer).vocab_size
