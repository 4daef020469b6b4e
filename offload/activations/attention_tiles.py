"""Causal attention of a tile of queries over tiles of keys: softmaxes over some of the keys, put together.

Each pair of tiles is one call of a kernel: the last tile of keys is that of the queries and causal, those before it
are seen whole. What comes out of softmaxes over parts of the keys is weighted by their log-sum-exp, in fp32; the
backward of a pair takes the output and the log-sum-exp of *all* keys, so that pairs are added and nothing is merged
again. All tiles but the last are equal, so that kernels are made for few shapes.

[Note: operators without a public name] `torch.nn.functional.scaled_dot_product_attention` gives no log-sum-exp, and
its backward takes none. What stands behind it does both: PyTorch's own context parallelism
(`torch.distributed.tensor.experimental`) calls it as it is called here. It is called in this file alone. cuDNN's is up
to twice as fast as flash attention on Hopper; each takes fewer heads of keys than of queries as they are.

Shapes: B sequences, T queries of a tile, H query heads and K key-value heads of size E. q (B, H, T, E), k and v (B, K,
T', E) in any strides, log-sum-exp (B, H, T) in fp32, or fp64 for fp64.

Source: arXiv 2310.01889 (ring attention), arXiv 2408.16978 (the order of tiles).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
Keys = tuple[Tensor, Tensor]
"""k and v of a tile, or their gradients."""
HALVES = (torch.bfloat16, torch.float16)


def is_known(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel that gives a log-sum-exp."""
    return device.type != "cuda" or dtype in HALVES


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """ValueError where no kernel gives a log-sum-exp."""
    if not is_known(dtype, device):
        raise ValueError(
            f"offload.activations.mode=stream in {str(dtype).removeprefix('torch.')} on a GPU, where its kernels know "
            "16 bits alone; set train.dtype=bf16, or offload.activations.mode=swap"
        )


def attend(q: Tensor, keys: Sequence[Keys]) -> tuple[Tensor, Tensor]:
    """Of queries whose own tile of keys is the last; output (B, H, T, E) and log-sum-exp."""
    *before, own = keys
    out, sums = _kernel(q, *own, causal=True)
    if not before:
        return out, sums
    total = out.to(torch.promote_types(out.dtype, torch.float32))
    for k, v in before:
        part, found = _kernel(q, k, v, causal=False)
        total.lerp_(part.to(total.dtype), torch.sigmoid(found - sums).unsqueeze(-1))
        sums = torch.logaddexp(sums, found)
    return total.to(out.dtype), sums


def attended(
    q: Tensor, *, keys: Sequence[Keys], grads: list[Keys | None], stored: Sequence[Tensor], anchor: Tensor
) -> Tensor:
    """`attend` with a gradient: that of `keys` is added to `grads`, fp32, which are None at first.

    stored: output and log-sum-exp, where they are known. anchor: who asks for its gradient, which is None, asks for
    that of the keys, whether or not the queries have one."""
    out: Tensor = _Attend.apply(q, anchor, keys, grads, stored)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, _: Tensor, keys: Sequence[Keys], grads: list[Keys | None], stored: Sequence[Tensor]
    ) -> Tensor:
        out, sums = stored or attend(q, keys)
        ctx.keys, ctx.grads = keys, grads
        ctx.save_for_backward(q, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, sums = ctx.saved_tensors
        precise = torch.promote_types(q.dtype, torch.float32)
        grad_q: Tensor | None = None
        for number, (k, v) in reversed(list(enumerate(ctx.keys))):
            causal = number == len(ctx.keys) - 1
            found, *of_keys = _kernel_backward(grad, q, k, v, out, sums, causal=causal)
            grad_q = found.to(precise) if grad_q is None else grad_q.add_(found)
            known = ctx.grads[number]
            if known is None:
                ctx.grads[number] = (of_keys[0].to(precise), of_keys[1].to(precise))
            else:
                for total, one in zip(known, of_keys, strict=True):
                    total.add_(one)
        assert grad_q is not None
        return grad_q.to(q.dtype), None, None, None, None


# ---------------------------------------------------------------------------------------------------- kernels


def _kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif _cudnn(q.device):
        out, sums, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    else:
        out, sums, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out, sums.reshape(q.shape[:3])


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v."""
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, sums, 0.0, causal)
    else:
        seed, lengths = _no_seed(q.device), (None, None, q.size(2), k.size(2))
        if _cudnn(q.device):
            sums = sums.reshape(*q.shape[:3], *[1] * (_cudnn_sums_dim(q.device) - 3))
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, sums, seed, seed, None, *lengths, 0.0, causal
            )
        else:
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, sums, *lengths, 0.0, causal, seed, seed
            )
    return grads[0], grads[1], grads[2]


def _cudnn(device: torch.device) -> bool:
    """As `trainer.models.attention` chooses: on Hopper and later, where it is not switched off."""
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _no_seed(device: torch.device) -> Tensor:
    """What stands for dropout's random numbers where there is no dropout."""
    return torch.zeros(2, dtype=torch.int64, device=device)


@cache
def _cudnn_sums_dim(device: torch.device) -> int:
    """Dimensions of its log-sum-exp: 3, or 4 with a last one of 1, as PyTorch's versions differ."""
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    sums: Tensor = aten._scaled_dot_product_cudnn_attention(q, q, q, None, True, 0.0, True, False)[1]
    return sums.dim()
