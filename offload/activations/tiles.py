"""Modules that look at one token at a time, run over a few tokens at a time: what is inside never exists for all.

An MLP's inner tensors are the widest of a block: with SwiGLU three times f a token, and their gradients as many. Run by
tiles only its input is saved; the backward runs each tile again and at once backward, so that one tile's inner tensors
exist at a time. The price is the MLP's forward once more, which α = 0 pays too, but for its last product. Weight
gradients of tiles are summed in fp32.

A product over fewer rows may round differently: a tiled run is not bitwise one that is not, but it is bitwise itself
whatever else activations do.

Source: the tiled MLP of arXiv 2506.13996 (Arctic Long Sequence Training).
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from offload.activations.watch import unwatched


def can_tile(module: nn.Module) -> bool:
    """Whether it surely looks at one token at a time and draws nothing at random: Linears, and what has no weights."""
    return any(isinstance(m, nn.Linear) for m in module.modules()) and all(
        isinstance(m, nn.Linear) or not (list(m.parameters(recurse=False)) or bool(getattr(m, "p", None)))
        for m in module.modules()
    )


def tile(modules: Sequence[nn.Module], num_tokens: int) -> None:
    """Have each of `modules`, which `can_tile`, run over `num_tokens` tokens at a time.

    They map (..., S, D) to (..., S, E), with no other argument. ValueError where there are none.
    """
    if not modules:
        raise ValueError(
            f"offload.activations.tile_tokens={num_tokens}: the model has no MLP of plain Linears; set it to null"
        )
    for module in modules:
        _tile(module, num_tokens)


def _tile(module: nn.Module, num_tokens: int) -> None:
    own: Any = weakref.ref(module)

    def forward(x: Tensor) -> Tensor:
        module = own()
        if x.numel() // x.size(-1) <= num_tokens:
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        weights = [p for p in module.parameters() if p.requires_grad]
        out: Tensor = _Tiled.apply(module, num_tokens, x, *weights)  # type: ignore[no-untyped-call]
        return out

    module.forward = torch.compiler.disable(forward)


class WeightSums:
    """Gradients of weights, summed in fp32 over tiles."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._sums: list[Tensor | None] = [None] * len(weights)
        self.anchor = torch.empty(0, requires_grad=True)
        """Asked for with them, see `offload.activations.attention_tiles.attended`."""

    def add(self, x: Tensor, outs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor | None:
        """Go backward from `outs`; the gradient of x."""
        wanted = [(out, grad.to(out.dtype)) for out, grad in zip(outs, grads, strict=True) if out.requires_grad]
        if not wanted:
            return None
        inputs = [*([x] if x.requires_grad else []), *self._weights, self.anchor]
        outs, grads = zip(*wanted, strict=True)
        found = list(torch.autograd.grad(outs, inputs, grads, allow_unused=True))
        grad_x = found.pop(0) if x.requires_grad else None
        for place, one in enumerate(found[:-1]):
            total = self._sums[place]
            if one is not None:
                precise = torch.promote_types(one.dtype, torch.float32)
                self._sums[place] = one.to(precise) if total is None else total.add_(one)
        return grad_x

    def totals(self) -> list[Tensor | None]:
        """The sums, each in its weight's dtype; None where there is none."""
        return [
            total.to(w.dtype) if total is not None else None for total, w in zip(self._sums, self._weights, strict=True)
        ]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.Module, num_tokens: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.module, ctx.num_tokens = module, num_tokens
        ctx.save_for_backward(x, *weights)  # the weights, so that whoever shards them has them there in the backward
        rows, out = x.reshape(-1, x.size(-1)), None
        with unwatched():
            for start in range(0, len(rows), num_tokens):
                part: Tensor = type(module).forward(module, rows[start : start + num_tokens])
                if out is None:
                    out = part.new_empty(len(rows), part.size(-1))
                out[start : start + num_tokens] = part
        assert out is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors
        sums = WeightSums([p for p in ctx.module.parameters() if p.requires_grad])
        wants_x = ctx.needs_input_grad[2]
        rows, grads = x.reshape(-1, x.size(-1)), grad.reshape(-1, grad.size(-1))
        grad_x = torch.empty_like(rows) if wants_x else None
        with unwatched():
            for start in range(0, len(rows), ctx.num_tokens):
                tile = slice(start, start + ctx.num_tokens)
                with torch.enable_grad():
                    part = rows[tile].detach().requires_grad_(wants_x)
                    y = type(ctx.module).forward(ctx.module, part)
                found = sums.add(part, [y], [grads[tile]])
                if grad_x is not None:
                    assert found is not None
                    grad_x[tile] = found
        return (
            None,
            None,
            grad_x.view_as(x) if grad_x is not None else None,
            *sums.totals(),
        )
