"""The chunked cross-entropy of the output projection, against PyTorch's on the whole logits matrix."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from trainer.models.loss import IGNORED, linear_cross_entropy, reference_cross_entropy

TOKENS, DIM, VOCAB = 23, 12, 17


def make_inputs(dtype: torch.dtype = torch.float64, device: str = "cpu", scale: float = 1.0) -> list[torch.Tensor]:
    """hidden, weight, bias (all wanting gradients) and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((TOKENS, DIM), (VOCAB, DIM), (VOCAB,))
    tensors = [(torch.randn(s, generator=generator) * scale).to(device, dtype).requires_grad_() for s in shapes]
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[[0, 5, 22]] = IGNORED
    return [*tensors, targets.to(device)]


def plain(hidden, weight, bias, targets, softcap=None) -> torch.Tensor:
    logits = linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, targets)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_and_gradients_equal_the_plain_ones(chunk_tokens, softcap):
    *leaves, targets = make_inputs()
    hidden, weight, bias = leaves
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens, bias=bias, softcap=softcap)
    expected = plain(*leaves, targets, softcap)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves))


def test_only_the_gradients_that_are_wanted_are_made():
    hidden, weight, _, targets = make_inputs()
    linear_cross_entropy(hidden.detach(), weight, targets, chunk_tokens=8).backward()
    assert weight.grad is not None and hidden.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, chunk_tokens=8).requires_grad


def test_a_weight_that_is_released_before_the_backward_gets_its_gradient():
    hidden, weight, bias, targets = make_inputs()
    expected = torch.autograd.grad(plain(hidden, weight, bias, targets), [hidden, weight])
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=8, bias=bias)
    weight.data = torch.full_like(weight, torch.nan)
    loss.backward()
    torch.testing.assert_close([hidden.grad, weight.grad], list(expected))


def test_nothing_to_predict_is_no_loss_and_no_gradient():
    hidden, weight, _, targets = make_inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), chunk_tokens=8)
    loss.backward()
    assert loss == 0 and not weight.grad.any() and not hidden.grad.any()


def test_many_chunks_lose_no_more_bits_than_one():
    *leaves, targets = make_inputs(torch.bfloat16)
    hidden, weight, bias = leaves
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(plain(*doubles, targets), doubles[1])[0]
    errors = []
    for chunk_tokens in (TOKENS, 3):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens, bias=bias)
        errors.append((torch.autograd.grad(loss, weight)[0] - exact).norm() / exact.norm())
    assert errors[0] < 4e-3 and errors[1] < 1.2 * errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [5, 4096, 32001])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_kernel_equals_the_reference(vocab, softcap):
    from trainer.models.loss_kernel import cross_entropy_

    targets = torch.randint(vocab, (50,), device="cuda")
    targets[::7] = IGNORED
    scale = torch.tensor(0.25, device="cuda")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        logits = (torch.randn(50, vocab, device="cuda") * 20).to(dtype)
        losses, gradients = reference_cross_entropy(logits.double(), targets, scale.double(), softcap, True)
        ours = cross_entropy_(logits.clone(), targets, scale, softcap, False, ignored=IGNORED)
        torch.testing.assert_close(ours.double(), losses, rtol=1e-5, atol=1e-5)
        cross_entropy_(logits, targets, scale, softcap, True, ignored=IGNORED)
        torch.testing.assert_close(logits.double(), gradients, rtol=tolerance, atol=1e-6)


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_as_near_the_exact_gradient_as_a_plain_cross_entropy():
    hidden = torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(8000, 256, device="cuda", dtype=torch.bfloat16) / 16).requires_grad_()
    targets = torch.randint(8000, (3000,), device="cuda")
    exact = torch.autograd.grad(cross_entropy(hidden.double() @ weight.double().t(), targets), (hidden, weight))
    ordinary = torch.autograd.grad(cross_entropy(linear(hidden, weight).float(), targets), (hidden, weight))
    chunked = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk_tokens=512), (hidden, weight))
    for good, usual, ours in zip(exact, ordinary, chunked, strict=True):
        error, usual_error = ((x.double() - good.double()).norm() / good.double().norm() for x in (ours, usual))
        assert error < 1.05 * usual_error
