"""What tests of activations that leave have in common: a model with the same weights every time, steps that are given
up, steps that must not add up."""

import gc
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from trainer.models.llama import Llama
from trainer.options import LlamaOptions


def llama_of(
    options: LlamaOptions, *, vocab_size: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> Llama:
    """The same weights every time."""
    model = Llama(options, vocab_size=vocab_size, seq_len=seq_len, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    tied: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            values = torch.randn(p.shape, generator=generator) * 0.1 + (1 if p.ndim == 1 else 0)
            setattr(module, name, tied.setdefault(p, nn.Parameter(values.to(device, dtype))))
    return model


def give_up_in_each_block(
    model: Any, step: Callable[[], Any], forward: Callable[[], Any], then: Callable[[], None]
) -> None:
    """For each block: a forward whose graph is dropped, a `step` whose backward ends when it comes there, `then`."""

    def stop(_: Tensor) -> None:
        raise InterruptedError

    for block in model.blocks():
        forward()
        handle = block.register_forward_hook(lambda _, __, out: out.register_hook(stop) and None)
        with pytest.raises(InterruptedError):
            step()
        handle.remove()
        gc.collect()
        then()


def nothing_grows(step: Callable[[], Any], state: Callable[[], Any], num_steps: int) -> None:
    """`state` stays, and so does the process's memory, from the second step on to `num_steps` later."""
    process = psutil.Process()
    for _ in range(2):
        step()
    before, resident = state(), 0
    for number in range(num_steps):
        step()
        if number == 20:
            resident = process.memory_info().rss
    assert state() == before
    assert process.memory_info().rss < resident + (16 << 20)
