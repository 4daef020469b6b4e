"""MLPs by tiles: the same gradients in less memory, alone and with activations that leave."""

import pytest
import torch
from torch import Tensor, nn

from offload.activations.blocks import Activations
from offload.activations.tiles import can_tile, tile
from offload.options import ActivationOptions
from offload.plan import Recorder, load_bytes
from tests.offload.leaving import llama_of
from trainer.models.llama import Llama
from trainer.options import LlamaOptions

CPU = torch.device("cpu")
SEQ = 45
OPTIONS = LlamaOptions(dim=32, ffn_dim=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)


def llama(dtype: torch.dtype = torch.float32) -> Llama:
    """The same weights every time."""
    return llama_of(OPTIONS, vocab_size=64, seq_len=SEQ, dtype=dtype, device=CPU)


def gradients(model: nn.Module) -> list[Tensor]:
    tokens = torch.randint(64, (2, SEQ + 1), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("num_tokens", [7, 30, 89, 90, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_whole(num_tokens: int, dtype: torch.dtype) -> None:
    expected, model = gradients(llama(dtype)), llama(dtype)
    tile(model.tiles(), num_tokens)
    found = gradients(model)
    assert len(found) == len(expected) == 1 + len(list(model.parameters()))
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **near)


@pytest.mark.parametrize(("mode", "alpha"), [("swap", 1.0), ("swap", 0.0), ("recompute", None), ("input", None)])
def test_with_activations_that_leave_they_are_bitwise_those_of_tiles_that_stay(mode: str, alpha: float | None) -> None:
    plain, model = llama(), llama()
    for one in (plain, model):
        tile(one.tiles(), 32)
    Activations(ActivationOptions(mode=mode, alpha=alpha, keep_last=0), CPU, poison=True).wrap(model.blocks())
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(a, b)


def test_what_is_inside_never_exists_for_all_tokens() -> None:
    def most_bytes(num_tokens: int | None) -> int:
        model = llama()
        if num_tokens:
            tile(model.tiles(), num_tokens)
        with Recorder() as recorder:
            gradients(model)
        return load_bytes(recorder.requests())

    inner = 4 * 2 * SEQ * 3 * OPTIONS.ffn_dim  # gate, up and their product, of one block
    assert most_bytes(9) < most_bytes(None) - 3 * inner


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    plain, model = llama(), llama()
    for one in (plain, model):
        one.embed.requires_grad_(False)
        one.layers[0].requires_grad_(False)
        one.layers[1].mlp.down.requires_grad_(False)
    tile(model.tiles(), 16)
    found, expected = gradients(model), gradients(plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert model.layers[1].mlp.down.weight.grad is None


def test_what_may_look_at_other_tokens_is_not_tiled() -> None:
    linear = nn.Linear(4, 4)
    assert can_tile(nn.Sequential(linear, nn.SiLU(), linear))
    assert not can_tile(nn.Sequential(linear, nn.Dropout(0.1)))
    assert not can_tile(nn.Sequential(linear, nn.LayerNorm(4)))
    assert not can_tile(nn.ReLU())
    with pytest.raises(ValueError, match=r"offload\.activations\.tile_tokens=8: the model has no MLP"):
        tile([], 8)
