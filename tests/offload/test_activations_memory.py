"""Activations that leave: what is computed again, what stays on the device, and what host memory holds for them."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offload.activations.blocks import Activations
from offload.activations.memory import POISON
from offload.hostpool import HostPool
from offload.options import ActivationOptions
from tests.offload.leaving import (
    CPU,
    LAYERS,
    OPTIONS,
    SEQ,
    assert_equal,
    batch,
    gradients,
    held_after_forward,
    kept_by_a_block,
    leaving,
    llama,
    nothing_grows,
    one_thread,
)

__all__ = ["one_thread"]


# ---------------------------------------------------------------------------------------------------- what is done


def flops(mode: str, alpha: float | None) -> int:
    model = llama()
    if mode != "keep":
        leaving(model, mode, alpha, keep_last=0)
    with FlopCounterMode(display=False) as counter:
        gradients(model, *batch())
    return counter.get_total_flops()


def test_what_is_computed_again_is_the_share_of_the_products_that_was_not_swapped() -> None:
    tokens, o = 2 * SEQ, OPTIONS
    width = (o.num_heads + 2 * o.num_kv_heads) * o.head_dim
    again = 2 * tokens * o.dim * (width + o.num_heads * o.head_dim + 2 * o.ffn_dim) * LAYERS  # not that of `down`
    kept = flops("keep", None)
    assert flops("swap", 1.0) == kept
    assert flops("swap", 0.0) == flops("recompute", None) == kept + again
    assert flops("swap", 0.75) == kept + again // 4


@pytest.mark.parametrize(
    ("mode", "alpha", "times"),
    [("swap", 1.0, 1), ("swap", 0.5, 1), ("swap", 0.0, 1), ("recompute", None, 1), ("input", None, 2)],
)
def test_attention_runs_again_only_from_the_input_alone(
    mode: str, alpha: float | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    model = llama()
    leaving(model, mode, alpha, keep_last=0)
    gradients(model, *batch())
    assert len(calls) == times * LAYERS


def test_what_leaves_is_held_no_more() -> None:
    tokens, o = 2 * SEQ, OPTIONS
    block = kept_by_a_block()
    outside = held_after_forward(1, "keep", None) - block
    assert held_after_forward(6, "swap", 1.0) <= outside
    assert held_after_forward(6, "swap", 0.3, keep_last=2) <= outside + 2 * block
    assert held_after_forward(6, "input", None) <= outside
    stays = 4 * tokens * (o.dim + o.num_heads * o.head_dim + o.num_heads)  # input, output, log-sum-exp
    assert held_after_forward(6, "recompute", None) <= outside + 6 * stays
    assert 6 * stays < block


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("num_steps", [50, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
def test_nothing_grows(num_steps: int) -> None:
    model = llama()
    swap = leaving(model, "swap", 0.5)

    def state() -> tuple[Any, ...]:
        gc.collect()
        tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        slots = swap.pools._slots
        return tensors, swap.pools.size_bytes(), swap.pools.num_buffers, slots.num, len(swap._tapes), len(swap._leases)

    nothing_grows(lambda: gradients(model, *batch()), state, num_steps)
    assert swap.pools.num_buffers == 2
    assert swap.pools._slots.num == LAYERS - 2


def test_the_input_alone_takes_no_more_host_memory_than_that() -> None:
    model = llama()
    swap = leaving(model, "input", None, keep_last=1)
    gradients(model, *batch())
    wanted = (LAYERS - 1) * 4 * 2 * SEQ * OPTIONS.dim
    assert wanted <= swap.pools.size_bytes()["host"] < wanted + 4096  # a page


def test_a_model_that_is_let_go_of_is_gone_at_once() -> None:
    """Also while garbage is not collected: nothing that was wrapped holds itself."""
    model = llama()
    swap = leaving(model, "swap", 0.5)
    gradients(model, *batch())
    weights, kept = [weakref.ref(p) for p in model.parameters()], weakref.ref(swap)
    gc.collect()
    gc.disable()
    try:
        del swap, model
        assert [p for p in weights if p() is not None] == [] and kept() is None
    finally:
        gc.enable()


def test_closed_blocks_are_as_they_were() -> None:
    model, expected = llama(), gradients(llama(), *batch())
    before = [set(module.__dict__) for module in model.modules()]
    swap = leaving(model)
    swap.close()
    assert [set(module.__dict__) for module in model.modules()] == before
    assert_equal(gradients(model, *batch()), expected)


def test_memory_that_is_given_back_is_poisoned() -> None:
    """So the other tests would find whoever still reads it."""
    model = llama()
    swap = leaving(model)
    gradients(model, *batch())
    swap._give_back()
    given = [*swap.pools._buffers, *swap.pools._slots.free]
    assert len(given) == 2 + LAYERS - 2
    assert all(bool((memory.data == POISON).all()) for memory in given)


def test_a_graph_that_is_dropped_gives_its_memory_back() -> None:
    model = llama()
    swap = leaving(model)
    expected = gradients(llama(), *batch())
    for _ in range(3):
        loss = model(*batch())
        del loss
        swap._give_back()
    assert len(swap.pools._slots.free) == swap.pools._slots.num == LAYERS - 2
    assert_equal(gradients(model, *batch()), expected)


def test_a_graph_that_is_dropped_holds_nothing_however_small() -> None:
    """What its operators have made and saved themselves would hold it, and all that it leads to."""
    block = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    leave = Activations(ActivationOptions(mode="recompute", keep_last=0), CPU)
    leave.wrap([block])
    block(torch.ones(1, 2))
    left = weakref.ref(block[0].weight)
    del block, leave
    gc.collect()
    assert left() is None


def test_lengths_may_vary_and_only_longer_ones_take_more() -> None:
    plain, model = llama(), llama()
    swap = leaving(model, "swap", 1.0)
    sizes = []
    for length in (SEQ, SEQ // 3, SEQ, 2 * SEQ, 7, SEQ):
        assert_equal(gradients(model, *batch(length)), gradients(plain, *batch(length)))
        sizes.append(swap.pools.size_bytes()["host"])
    assert len(set(sizes[:3])) == len(set(sizes[3:])) == 1
    assert sizes[3] > sizes[0]
    assert swap.pools.num_buffers == 2


def test_slots_and_buffers_are_made_for_the_longest_at_once() -> None:
    """[Note: made for the longest]: whatever comes first, nothing is made again, and nothing is larger than needed."""
    plain, model, alone = llama(), llama(), llama()
    swap = Activations(ActivationOptions(mode="swap", alpha=0.4), CPU, most_tokens=4 * SEQ, poison=True)
    swap.wrap(model.blocks())
    sizes, close = set(), {"rtol": 1e-5, "atol": 1e-6}
    for length in (7, SEQ // 3, SEQ, 2 * SEQ, 13):
        for a, b in zip(gradients(model, *batch(length)), gradients(plain, *batch(length)), strict=True):
            torch.testing.assert_close(a, b, **close)
        sizes.add((swap.pools.size_bytes()["host"], swap.pools.buffer_bytes, swap.pools.num_buffers))
    assert len(sizes) == 1
    longest = leaving(alone, "swap", 0.4)
    gradients(alone, *batch(2 * SEQ))
    host, buffers, _ = sizes.pop()
    assert longest.pools.size_bytes()["host"] <= host <= 1.1 * longest.pools.size_bytes()["host"]
    assert longest.pools.buffer_bytes <= buffers <= 1.1 * longest.pools.buffer_bytes


@pytest.mark.parametrize("native", [True, False])
def test_threads_take_the_pages_of_host_memory(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as we say, one time for all slots; where the C code is not to be had, one thread does it."""
    taken, real = [], HostPool.call

    def call(pool: HostPool, function: str, arguments: Any) -> None:
        taken.append((function, pool.threads))
        real(pool, function, arguments)

    monkeypatch.setattr(HostPool, "call", call)
    if not native:
        monkeypatch.setattr("offload.hostpool._library", lambda: None)
    expected, model = gradients(llama(), *batch()), llama()
    swap = Activations(ActivationOptions(mode="swap", alpha=1.0), CPU, threads=3, poison=True)
    swap.wrap(model.blocks())
    for _ in range(2):
        assert_equal(gradients(model, *batch()), expected)
    assert taken == [("populate", 3)] * native
    assert swap.pools.size_bytes()["host"] > 0
