"""SwiGLU's own backward against autograd's."""

import pytest
import torch

from trainer.models.swiglu import swiglu


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gradients(function, gate_up: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = gate_up.clone().requires_grad_()
    out = function(gate_up)
    out.backward(grad)
    return out.detach(), gate_up.grad


@pytest.mark.parametrize("shape", [(2,), (3, 5, 14), (4, 4098)])
def test_gradient_equals_autograd(shape) -> None:
    gate_up, grad = (
        torch.randn(shape, dtype=torch.float64),
        torch.randn(*shape[:-1], shape[-1] // 2, dtype=torch.float64),
    )
    for found, expected in zip(gradients(swiglu, gate_up, grad), gradients(reference, gate_up, grad), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (7, 2 * 8192), (64, 2 * 2049)])
def test_kernel_equals_double_precision(shape, dtype, tolerance, compiled) -> None:
    gate_up = torch.randn(shape, device="cuda").to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, device="cuda").to(dtype)
    function = torch.compile(swiglu) if compiled else swiglu
    expected = gradients(reference, gate_up.double(), grad.double())
    for a, b in zip(gradients(function, gate_up, grad), expected, strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance
