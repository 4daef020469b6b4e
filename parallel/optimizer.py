"""The update of this rank's state shards.

Parameters lie in the shards as ranges; each gets the update it would get alone. A parameter that got no gradient on
any rank is left untouched, as `torch.optim` does, though all share one step count for Adam's bias correction.
Weight decay goes to parameters of two or more dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from parallel.layout import ALIGN, Overlap
from parallel.options import OptimizerOptions
from parallel.unit import TrainableFlat

NORM_ROW = 512
"""Elements that a CPU sums in fp32: of a million in one go it loses 3e-5 of the norm, of 30 million 1e-3, and a clipped
step would hang on how far the gradient is sharded."""


class ShardOptimizer(Protocol):
    """What updates the states that are on the device."""

    def update(self, lr: float, scale: Tensor | None, updates: int) -> None:
        """Update master, moments and `owned` from ``scale * grad``, for the `updates`-th time (from 1)."""


def moment_kinds(options: OptimizerOptions) -> tuple[str, ...]:
    """The kinds of state beside the master weights, each fp32 and as large as the parameters."""
    if options.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if options.momentum else ()


def build(options: OptimizerOptions, flats: Sequence[TrainableFlat]) -> ShardOptimizer:
    """AdamW on CUDA is one Triton kernel; everything else is `torch.optim`'s fused implementation."""
    if options.name == "adamw" and flats and flats[0].master.device.type == "cuda":
        from parallel.kernels import adamw_step

        return FusedAdamW(options, flats, adamw_step)
    return TorchOptimizer(options, flats)


class TorchOptimizer:
    """`torch.optim` on views of the shards, one a parameter; the moments are ours, put into its state."""

    def __init__(self, options: OptimizerOptions, flats: Sequence[TrainableFlat]) -> None:
        self._flats = flats
        self._views: list[tuple[TrainableFlat, Overlap, torch.nn.Parameter]] = []
        groups: list[dict[str, object]] = []
        for decays in (True, False):
            views = [
                (flat, o, torch.nn.Parameter(o.of(flat.master)))
                for flat in flats
                for o in flat.layout.overlaps(flat.optim_start, flat.optim_stop)
                if (len(o.entry.shape) >= 2) == decays
            ]
            self._views += views
            decay = options.weight_decay if decays else 0.0
            groups.append({"params": [parameter for *_, parameter in views], "weight_decay": decay})
        if options.name == "adamw":
            betas = (options.beta1, options.beta2)
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups, lr=options.lr, betas=betas, eps=options.eps, fused=True
            )
        else:
            self._optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=True)
        for flat, o, parameter in self._views:
            state = {kind: o.of(moment) for kind, moment in flat.moments.items()}
            if options.name == "adamw":
                state["step"] = torch.zeros((), device=parameter.device)
            self._optimizer.state[parameter] = state

    def update(self, lr: float, scale: Tensor | None, updates: int) -> None:
        grads = {}
        for flat in self._flats:
            assert flat.grad is not None
            grad = flat.grad.float()
            grads[flat] = grad if scale is None else grad.mul_(scale)
        for flat, o, parameter in self._views:
            parameter.grad = o.of(grads[flat]) if flat.received[o.index] else None
            if "step" in self._optimizer.state[parameter]:
                self._optimizer.state[parameter]["step"].fill_(updates - 1)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        for flat in self._flats:
            if flat.owned is not None and flat.owned is not flat.master:
                flat.owned.copy_(flat.master)
        self._optimizer.zero_grad()


class FusedAdamW:
    """AdamW in one pass over memory: gradient in, master and moments updated, weights in the compute dtype out."""

    def __init__(self, options: OptimizerOptions, flats: Sequence[TrainableFlat], kernel: Callable[..., None]) -> None:
        self._options, self._flats, self._kernel = options, flats, kernel

    def update(self, lr: float, scale: Tensor | None, updates: int) -> None:
        for flat in self._flats:
            assert flat.grad is not None
            for start, stop, decays in runs(flat):
                part = slice(start, stop)
                self._kernel(
                    flat.master[part],
                    flat.moments["exp_avg"][part],
                    flat.moments["exp_avg_sq"][part],
                    flat.grad[part],
                    None if flat.owned is None or flat.owned is flat.master else flat.owned[part],
                    scale,
                    lr=lr,
                    beta1=self._options.beta1,
                    beta2=self._options.beta2,
                    eps=self._options.eps,
                    weight_decay=self._options.weight_decay if decays else 0.0,
                    updates=updates,
                )


def sum_of_squares(values: Tensor) -> Tensor:
    """Of a 1-D tensor, 0-dim float64: `NORM_ROW` elements at a time in fp32, their sum in fp64."""
    if values.device.type == "cuda":
        from parallel import kernels

        return kernels.sum_of_squares(values)
    whole = values.numel() // NORM_ROW * NORM_ROW
    norms = torch.linalg.vector_norm(values[:whole].view(-1, NORM_ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(values[whole:], dtype=torch.float32)
    total: Tensor = norms.double().square().sum() + rest.double().square()
    return total


def runs(flat: TrainableFlat) -> list[tuple[int, int, bool]]:
    """Neighbouring parameters that are updated alike, as ranges ``start, stop`` of the shard and whether they decay."""
    runs: list[tuple[int, int, bool]] = []
    for o in flat.layout.overlaps(flat.optim_start, flat.optim_stop):
        if not flat.received[o.index]:
            continue
        stop, decays = o.offset + o.stop - o.start, len(o.entry.shape) >= 2
        if runs and runs[-1][2] == decays and o.offset - runs[-1][1] < ALIGN:  # only padding between them
            runs[-1] = (runs[-1][0], stop, decays)
        else:
            runs.append((o.offset, stop, decays))
    return runs
