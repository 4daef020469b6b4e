"""The Triton kernel of `trainer.models.loss`: logits become the gradient of their cross-entropy in one launch.

One row (token) per program. A first pass over the row keeps a running maximum and a running sum of exponentials (the
online softmax, arXiv 1805.02867); a second one, which finds the row in the cache, overwrites it with its gradient.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: Tensor, softcap: float | None, with_grad: bool, *, ignored: int
) -> Tensor:
    """Losses (T,) fp32, each times `scale`, 0 where the target is `ignored`; logits (T, V) are overwritten by the
    gradient of their sum, if asked."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and targets.is_contiguous()
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits,
        targets,
        scale,
        losses,
        logits.stride(0),
        vocab,
        softcap or 1.0,
        HAS_SOFTCAP=softcap is not None,
        WITH_GRAD=with_grad,
        IGNORED=ignored,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=8,
    )
    return losses


@triton.jit
def _bend(x, softcap, HAS_SOFTCAP: tl.constexpr):
    # tanh by the exponential of a number that is never positive, which cannot overflow
    if HAS_SOFTCAP:
        e = tl.exp(-2 * tl.abs(x) / softcap)
        x = tl.where(x < 0, -softcap, softcap) * (1 - e) / (1 + e)
    return x


@triton.jit
def _cross_entropy(
    logits, targets, scale, losses, stride, vocab, softcap,
    HAS_SOFTCAP: tl.constexpr, WITH_GRAD: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    factor = tl.where(target == IGNORED, 0.0, tl.load(scale))
    columns = tl.arange(0, BLOCK)

    maxima = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each lane: they are joined once, after the loop
    sums = tl.zeros((BLOCK,), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
        x = tl.where(start + columns < vocab, _bend(x, softcap, HAS_SOFTCAP), float("-inf"))
        larger = tl.maximum(maxima, x)
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a lane that has seen nothing yet
        sums = sums * tl.exp(maxima - shift) + tl.exp(x - shift)
        maxima = larger
        chosen += tl.where(start + columns == target, x, 0.0)
    maximum = tl.max(maxima, 0)
    log_sum = maximum + tl.log(tl.sum(sums * tl.exp(maxima - maximum), 0))

    # Where the target is ignored nothing was chosen, and the factor is 0.
    tl.store(losses + row, (log_sum - tl.sum(chosen, 0)) * factor)
    if WITH_GRAD:
        for start in range(0, vocab, BLOCK):
            mask = start + columns < vocab
            x = _bend(tl.load(logits + start + columns, mask=mask, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
            grad = (tl.exp(x - log_sum) - tl.where(start + columns == target, 1.0, 0.0)) * factor
            if HAS_SOFTCAP:
                grad *= 1 - (x / softcap) * (x / softcap)
            tl.store(logits + start + columns, grad.to(logits.dtype.element_ty), mask=mask)
