"""What tests of activations that leave have in common: a model with the same weights every time and its gradients, what
a forward leaves on the device, steps that are given up, steps that must not add up."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from offload.activations.blocks import Activations
from offload.options import ActivationOptions
from offload.plan import Recorder
from trainer.models.llama import Llama
from trainer.options import LlamaOptions

CPU = torch.device("cpu")
LAYERS, SEQ = 5, 48
OPTIONS = LlamaOptions(dim=64, ffn_dim=192, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=16)
LARGE = LlamaOptions(dim=512, ffn_dim=1536, num_layers=12, num_heads=8, num_kv_heads=4, head_dim=64)
SWAPPED = [("swap", 1.0), ("swap", 0.0), ("recompute", None), ("input", None)]


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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores take longer than these models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(dtype: torch.dtype = torch.float32, device: torch.device = CPU, options: LlamaOptions = OPTIONS) -> Llama:
    """The same weights every time."""
    return llama_of(options, vocab_size=128, seq_len=2 * SEQ, dtype=dtype, device=device)


def batch(length: int = SEQ, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(128, (2, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def leaving(model: Any, mode: str = "swap", alpha: float | None = 1.0, **options: Any) -> Activations:
    device = next(model.parameters()).device
    hooks = {name: options.pop(name) for name in ("pack", "unpack") if name in options}
    made = Activations(ActivationOptions(mode=mode, alpha=alpha, **options), device, poison=True, **hooks)
    made.wrap(model.blocks())
    return made


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def held_after_forward(num_layers: int, mode: str, alpha: float | None, keep_last: int = 0) -> int:
    """Bytes that a forward leaves on the device, of all that operators made; slots in host memory are not theirs."""
    model = llama(options=replace(OPTIONS, num_layers=num_layers))
    swap = leaving(model, mode, alpha, keep_last=keep_last)
    inputs = batch()
    with Recorder() as recorder:
        loss = model(*inputs)
        swap._settle(0)
        torch.zeros(())  # a step after it, or what was let go of still counts
        end = recorder.num_steps - 1
        held = sum(r.size_bytes for r in recorder.requests() if r.last == end)
    del loss
    return held


def kept_by_a_block() -> int:
    one, two = (held_after_forward(n, "keep", None) for n in (1, 2))
    return two - one


def leaves_bytes(kind: str) -> int:
    """Of a block in fp32: input, or attention's output and log-sum-exp."""
    o = OPTIONS
    return 4 * 2 * SEQ * (o.dim if kind == "input" else o.num_heads * (o.head_dim + 1))


def tiny_hf(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    configs: dict[str, Callable[[], Any]] = {
        "qwen3": lambda: transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16),
        "gemma2": lambda: transformers.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16, sliding_window=16),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]())


class HFLoss(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lm: Any = tiny_hf(kind)

    def blocks(self) -> list[nn.Module]:
        return list(max((m for m in self.lm.modules() if isinstance(m, nn.ModuleList)), key=len))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        torch.manual_seed(9)  # GPT-2 has dropout
        logits = self.lm(input_ids=tokens, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
