"""The output projection and its cross-entropy, a chunk of tokens at a time.

Logits of all tokens are the largest tensor of a language model: 16,384 tokens over 32,000 words take 2 GiB in fp32,
and a plain cross-entropy holds several of them. Here each chunk's logits turn into its loss and, in place, into the
gradient with respect to them; the gradients of the hidden states and of the weight are made of that at once, in the
forward. So one chunk of logits exists at a time, no product is computed twice, and the backward only multiplies by the
gradient that arrives.

Invariants: the softmax and the sum over tokens are in fp32 whatever the compute dtype is, and so is the sum of the
weight's gradient over chunks. The weight is read in the forward alone: it may be released before the backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""A target that has no loss."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean over the targets other than -100 of the cross-entropy in nats of ``hidden @ weight.T + bias``.

    hidden (..., D) and weight (V, D) in the compute dtype, targets (...) int64; returns a 0-dim fp32 (fp64 for fp64),
    0 where every target is -100. ``softcap`` c bends logits to ``c * tanh(logits / c)`` (Gemma 2, arXiv 2408.00118).
    """
    hidden, targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    inputs = (hidden, weight, bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        *inputs, targets, chunk_tokens, softcap, wanted
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
        softcap: float | None,
        wanted: list[bool],
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        scale = 1 / (targets != IGNORED).sum().clamp(min=1).to(precise)  # stays on the device: no synchronization
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and wanted[2] else None
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = torch.nn.functional.linear(hidden[chunk], weight, bias)
            losses, grad_logits = cross_entropy(logits, targets[chunk], scale, softcap, any(wanted))
            loss += losses.sum()
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), hidden[chunk])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=precise)
        grads = (grad_hidden, grad_weight, grad_bias)
        # An attribute, not save_for_backward: hooks on saved tensors would offload what is about to be used.
        ctx.grads = [g if g is None else g.to(hidden.dtype) for g in grads]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "the gradients were scaled in place by the first backward; there is no second"
        return *(g if g is None else g.mul_(grad_loss) for g in grads), None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` for `a` and `b` of one dtype and `total` of that or a wider one."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:  # a GEMM of half-precision matrices adds to an fp32 one at no cost
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def cross_entropy(
    logits: Tensor, targets: Tensor, scale: Tensor, softcap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses (T,) and, if asked, gradients (T, V) of ``scale * sum(cross-entropies)``.

    logits (T, V), overwritten on CUDA; targets (T,), scale 0-dim fp32. On CUDA one Triton kernel, else PyTorch.
    """
    if logits.is_cuda:
        from trainer.models.loss_kernel import cross_entropy_  # Triton comes with PyTorch for CUDA alone

        return cross_entropy_(logits, targets, scale, softcap, with_grad, ignored=IGNORED), logits
    return reference_cross_entropy(logits, targets, scale, softcap, with_grad)


def reference_cross_entropy(
    logits: Tensor, targets: Tensor, scale: Tensor, softcap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` in PyTorch; `logits` may be overwritten."""
    x = logits.to(scale.dtype)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    scales = torch.where(targets != IGNORED, scale, 0)
    index = targets.clamp(min=0).unsqueeze(1)
    log_sum = x.logsumexp(1, keepdim=True)
    losses = (log_sum - x.gather(1, index)).squeeze(1) * scales
    if not with_grad:
        return losses, logits
    grad = (x - log_sum).exp_() if softcap is not None else x.sub_(log_sum).exp_()
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=x.dtype)).mul_(scales.unsqueeze(1))
    if softcap is not None:
        grad *= 1 - (x / softcap) ** 2
    return losses, grad.to(logits.dtype)
