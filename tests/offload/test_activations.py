"""Activations that leave: the gradients are those of blocks that keep everything, in far less memory on the device.

On CPU the same code runs as on a GPU, each copy done when it is asked for. Memory is poisoned when it is given back.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload.activations.plan import Choice
from offload.options import ActivationOptions
from tests.offload.leaving import (
    LARGE,
    OPTIONS,
    SEQ,
    SWAPPED,
    HFLoss,
    assert_equal,
    batch,
    gradients,
    leaving,
    llama,
    one_thread,
)

__all__ = ["one_thread"]


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("mode", "alpha"), SWAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bitwise_those_of_blocks_that_keep_all(mode: str, alpha: float | None, dtype) -> None:
    expected = gradients(llama(dtype), *batch())
    model = llama(dtype)
    with_swap = leaving(model, mode, alpha)
    for _ in range(3):
        assert_equal(gradients(model, *batch()), expected)
    with_swap.close()


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 0.99])
def test_gradients_with_part_of_the_tokens_swapped(alpha: float) -> None:
    """Products of fewer rows may round differently, but for that they are the same."""
    expected, model = gradients(llama(), *batch()), llama()
    leaving(model, "swap", alpha)
    for a, b in zip(gradients(model, *batch()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_every_block_may_choose_for_itself() -> None:
    expected, model = gradients(llama(), *batch()), llama()
    swap = leaving(model)
    swap.set([Choice("recompute"), Choice("swap", 1.0), Choice("keep"), Choice("input"), Choice("swap", 0.0)])
    assert_equal(gradients(model, *batch()), expected)


def test_gradients_accumulate_over_micro_batches() -> None:
    plain, model = llama(), llama()
    leaving(model)
    for _ in range(3):
        for one in (plain, model):
            one(*batch()).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_frozen_embedding_is_no_hindrance() -> None:
    plain, model = llama(), llama()
    for one in (plain, model):
        one.embed.requires_grad_(False)
    leaving(model)
    assert_equal(gradients(model, *batch()), gradients(plain, *batch()))


def test_a_graph_may_be_gone_through_twice() -> None:
    plain, model = HFLoss("qwen3"), HFLoss("qwen3")
    leaving(model)
    for one in (plain, model):
        loss = one(*batch())
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


class Noisy(nn.Module):
    """Dropout before a product, an inner bias, no attention; sees its input as several views."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
        y = self.inner(self.drop(x.transpose(0, 1))).transpose(0, 1)
        return x + self.outer(torch.tanh(y) * scale) + x[:, :1], None


class Chain(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.list = nn.ModuleList(blocks)

    def blocks(self) -> list[nn.Module]:
        return list(self.list)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.list:
            x, _ = block(x, scale=torch.full((32, 64), 0.5))
        return x.square().mean()


class Split(nn.Module):
    """One part of a product goes through others before another part of it is looked at, as in DeepSeek's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.first, self.last = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
        a, b = self.both(x).split(32, dim=-1)
        a = torch.tanh(self.first(a))
        return x + self.last(a * torch.tanh(b)) * scale[:, :32].mean(), None


class InPlace(nn.Module):
    """Changes what a product and attention returned, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.inner, self.outer = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        with torch.no_grad():
            y = F.scaled_dot_product_attention(q, k, v).mul_(0.5).transpose(1, 2).flatten(2)
        x = x + self.inner(x + y).mul_(2.0).mul_(scale)[..., :32]
        return x + self.outer(F.leaky_relu(self.inner(x), 0.3, inplace=True)), None


@pytest.mark.parametrize("block", [Noisy, Split, InPlace])
@pytest.mark.parametrize(("mode", "alpha"), [("swap", 0.0), ("swap", 0.4), ("swap", 1.0), ("input", None)])
def test_blocks_of_any_kind(block: type[nn.Module], mode: str, alpha: float | None) -> None:
    found = []
    for away in (False, True):
        torch.manual_seed(3)
        model, x = Chain([block() for _ in range(3)]), torch.randn(2, 32, 32)
        if away:
            leaving(model, mode, alpha, keep_last=0)
        found.append([*gradients(model, x), torch.rand(4)])  # and what comes after draws the same numbers too
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class NoisyAttention(nn.Module):
    """Drops in attention and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3).transpose(1, 2).flatten(2)
        return x + F.dropout(self.out(y) * scale[:, :32].mean(), 0.3), None


@pytest.mark.parametrize(("mode", "alpha"), SWAPPED)
def test_attention_drops_the_same_again(mode: str, alpha: float | None) -> None:
    found = []
    for away in (False, True):
        torch.manual_seed(3)
        model, x = Chain([NoisyAttention() for _ in range(3)]), torch.randn(2, 32, 32)
        if away:
            leaving(model, mode, alpha, keep_last=0)
        found.append([*gradients(model, x), torch.rand(4)])
    assert_equal(*found)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize(("mode", "alpha"), [("swap", 0.0), ("swap", 1.0), ("input", None)])
def test_any_model_of_hugging_face(kind: str, mode: str, alpha: float | None) -> None:
    expected, model = gradients(HFLoss(kind).train(), *batch()), HFLoss(kind).train()
    leaving(model, mode, alpha, keep_last=1)
    assert_equal(gradients(model, *batch()), expected)


@pytest.mark.parametrize(("mode", "alpha"), [("swap", 1.0), ("swap", 0.5), ("recompute", None), ("input", None)])
def test_compiled_blocks(mode: str, alpha: float | None) -> None:
    """Linears and attention are graph breaks; the pieces are compiled once and the replay runs the same ones."""
    options = replace(OPTIONS, num_layers=3)
    expected, model = gradients(llama(options=options), *batch()), llama(options=options)
    torch._dynamo.reset()
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager")
    leaving(model, mode, alpha, keep_last=1)
    first = gradients(model, *batch())
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(gradients(model, *batch()), first)


def test_weights_go_through_the_engines_hooks() -> None:
    """As with weights that are gathered: autograd holds handles, and none of the weights."""
    expected, model = gradients(llama(), *batch()), llama()
    weights = {p.data_ptr(): p for p in model.parameters()}
    packed = []

    def pack(tensor: Tensor) -> Any:
        if tensor.data_ptr() not in weights:
            return tensor
        packed.append(tensor.data_ptr())
        return ("weight", tensor.data_ptr(), tensor.shape, tensor.stride())

    def unpack(handle: Any) -> Tensor:
        _, pointer, shape, stride = handle
        return weights[pointer].detach().as_strided(shape, stride)

    leaving(model, "swap", 1.0, keep_last=0, pack=pack, unpack=unpack)
    assert_equal(gradients(model, *batch()), expected)
    assert {p.data_ptr() for block in model.blocks() for p in block.parameters()} <= set(packed)


def test_evaluation_passes_through() -> None:
    model, plain = llama(), llama()
    swap = leaving(model)
    with torch.no_grad():
        assert torch.equal(model(*batch()), plain(*batch()))
    assert swap.pools.size_bytes() == {"buffers": 0, "host": 0, "nvme": 0}


# ---------------------------------------------------------------------------------------------------- errors


def test_a_block_that_changes_between_runs_is_told() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.runs = nn.Linear(32, 32), 0

        def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
            self.runs += 1
            x = self.inner(x)
            return (x.sin().exp() if self.runs == 1 else x.sum(0, keepdim=True).exp().expand_as(x)), None

    model = Chain([Fickle()])
    leaving(model, keep_last=0)
    with pytest.raises(RuntimeError, match="offload.activations.mode=keep"):
        gradients(model, torch.randn(2, 32, 32))


def test_two_forwards_before_a_backward_are_refused() -> None:
    model = llama()
    leaving(model)
    first = model(*batch())
    with pytest.raises(MemoryError, match="before the backward of the last"):
        model(*batch())
    del first


def test_too_little_host_memory_is_told_in_bytes() -> None:
    model = llama()
    leaving(model, host_bytes=4096)
    with pytest.raises(ValueError, match=r"offload\.activations\.host_bytes=4096: 3 blocks swap \d+ bytes each"):
        model(*batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "swop"}, "choose one of keep, swap, input, recompute, auto"),
        ({"mode": "input", "alpha": 0.5}, "is for offload.activations.mode=swap, not input"),
        ({"mode": "swap", "alpha": 1.5}, "must be from 0 to 1"),
        ({"mode": "recompute", "alpha": 0.5}, "is for offload.activations.mode=swap"),
        ({"mode": "swap", "keep_last": -1}, "must be 0 or more"),
        ({"mode": "swap", "host_bytes": 0}, "must be 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationOptions(**options)


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "alpha"), SWAPPED)
def test_gradients_on_a_gpu(mode: str, alpha: float | None) -> None:
    gpu = torch.device("cuda")
    inputs = batch(device=gpu)
    expected, model = gradients(llama(torch.bfloat16, gpu, LARGE), *inputs), llama(torch.bfloat16, gpu, LARGE)
    swap = leaving(model, mode, alpha)
    for _ in range(10):
        for a, b in zip(gradients(model, *inputs), expected, strict=True):
            assert (a - b).abs().max() <= 0.01 * b.abs().max()  # attention's backward may add in any order
    swap.close()


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_lower_and_does_not_grow() -> None:
    gpu = torch.device("cuda")
    tokens = torch.randint(128, (64, 2 * SEQ + 1), device=gpu)  # or the buffers weigh more than what leaves
    peaks, before = {}, torch.cuda.memory_allocated()
    for mode in ("keep", "swap"):
        model = llama(torch.bfloat16, gpu, LARGE)
        swap = leaving(model, "swap", 1.0) if mode == "swap" else None
        for step in range(20):
            torch.cuda.reset_peak_memory_stats()
            gradients(model, tokens[:, :-1], tokens[:, 1:])
            peaks[mode, step] = torch.cuda.max_memory_allocated() - before
        if swap:
            swap.close()
        del model, swap
        torch.cuda.empty_cache()
    assert peaks["swap", 19] < 0.7 * peaks["keep", 19]
    assert peaks["swap", 19] <= peaks["swap", 3]
