"""Triton kernels of the engine. Imported only on CUDA."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _adamw(  # type: ignore[no-untyped-def]
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, weight_ptr, scale_ptr,
    numel, lr, beta1, beta2, eps, decay, step_size, root_correction2,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    grad = tl.load(grad_ptr + offset, mask).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(scale_ptr)
    exp_avg = tl.load(exp_avg_ptr + offset, mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offset, mask)
    master = tl.load(master_ptr + offset, mask)
    exp_avg += (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    denominator = tl.sqrt_rn(exp_avg_sq) / root_correction2 + eps
    master = master * decay - step_size * (exp_avg / denominator)
    tl.store(exp_avg_ptr + offset, exp_avg, mask)
    tl.store(exp_avg_sq_ptr + offset, exp_avg_sq, mask)
    tl.store(master_ptr + offset, master, mask)
    if HAS_WEIGHT:
        tl.store(weight_ptr + offset, master.to(weight_ptr.dtype.element_ty), mask)


def adamw_step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    updates: int,
) -> None:
    """One AdamW update (arXiv 1711.05101, algorithm 2) of 1-D fp32 `master` and moments, in one pass over memory.

    grad: fp32 or bf16; weight: None, or where the new weights go in their own dtype; scale: None, or a 0-dim fp32 CUDA
    tensor that the gradient is multiplied by. 28 bytes an element with bf16 grad and weight.
    """
    numel = master.numel()
    _adamw[(triton.cdiv(numel, BLOCK),)](
        master, exp_avg, exp_avg_sq, grad, master if weight is None else weight, master if scale is None else scale,
        numel, lr, beta1, beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**updates), (1 - beta2**updates) ** 0.5,
        HAS_WEIGHT=weight is not None, HAS_SCALE=scale is not None, BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _sum_of_squares(values_ptr, sums_ptr, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offset, offset < numel, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(values * values))


def sum_of_squares(values: Tensor) -> Tensor:
    """Of a 1-D CUDA tensor of any floating dtype, 0-dim float64: blocks in fp32, their sum in fp64."""
    block = 8192
    sums = torch.empty(triton.cdiv(values.numel(), block), dtype=torch.float32, device=values.device)
    _sum_of_squares[sums.shape](values, sums, values.numel(), BLOCK=block, num_warps=8)
    return sums.sum(dtype=torch.float64)
