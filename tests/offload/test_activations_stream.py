"""Blocks that run by tiles: the gradients of the whole, whatever the tiles, and memory that comes back."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.activations import Activations
from offload.options import ActivationOptions
from tests.offload.test_activations import assert_equal, gradients, one_thread
from trainer.models.llama import Llama
from trainer.options import LlamaOptions

__all__ = ["one_thread"]
CPU = torch.device("cpu")
SEQ, BATCH = 45, 2
OPTIONS = LlamaOptions(dim=32, ffn_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
MODES = ["stream", "stream_input"]


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> Llama:
    """The same weights every time."""
    model = Llama(replace(OPTIONS, **changes), vocab_size=64, seq_len=2 * SEQ, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            values = torch.randn(p.shape, generator=generator) * 0.1 + (1 if p.ndim == 1 else 0)
            setattr(module, name, nn.Parameter(values.to(dtype)))
    return model


def batch(size: int = BATCH, length: int = SEQ) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(64, (size, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def streaming(model: Llama, tile_tokens: int, mode: str = "stream", **options: Any) -> Activations:
    """tile_tokens: of all sequences."""
    made = Activations(ActivationOptions(mode=mode, tile_tokens=tile_tokens), CPU, poison=True, **options)
    made.wrap(model.blocks())
    return made


def assert_near(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(("size", "tile"), [(1, 1), (1, 7), (1, 15), (1, 44), (1, 45), (1, 64), (2, 13), (2, 60)])
def test_gradients_are_those_of_the_whole(mode: str, heads: int, size: int, tile: int) -> None:
    expected, model = gradients(llama(num_kv_heads=heads), *batch(size)), llama(num_kv_heads=heads)
    stream = streaming(model, tile, mode)
    for _ in range(2):
        assert_near(gradients(model, *batch(size)), expected)
    assert len(expected) == 1 + len(list(model.parameters()))
    stream.close()
