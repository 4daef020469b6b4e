"""The Triton kernel of `trainer.models.swiglu`. Imported only on CUDA."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def _backward(gate_up_ptr, grad_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    both = row * 2 * F + column
    gate = tl.load(gate_up_ptr + both, mask).to(tl.float32)
    up = tl.load(gate_up_ptr + both + F, mask).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + column, mask).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + both, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask)
    tl.store(out_ptr + both + F, (grad * silu).to(dtype), mask)


@triton_op("atoll::swiglu_backward", mutates_args={})
def swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """gate_up (..., 2 F) and grad (..., F), contiguous; returns (..., 2 F) like `gate_up`."""
    out = torch.empty_like(gate_up)
    width = grad.size(-1)
    block = 2048
    grid = (grad.numel() // width, triton.cdiv(width, block))
    wrap_triton(_backward)[grid](gate_up, grad, out, width, BLOCK=block)
    return out
