"""Which of a block's activations leave: by what a link, host memory and the device take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.activations.blocks import Activations
from offload.activations.memory import GPU_SHARE, spare_bytes
from offload.activations.plan import BlockCost, Choice, choose, choose_alpha
from offload.options import ActivationOptions
from tests.offload.leaving import (
    CPU,
    LAYERS,
    OPTIONS,
    SEQ,
    assert_equal,
    batch,
    gradients,
    kept_by_a_block,
    leaves_bytes,
    leaving,
    llama,
    one_thread,
)
from trainer.determinism import deterministic

__all__ = ["one_thread"]


def cost(seconds: float = 1.0, kept: int | None = None) -> BlockCost:
    return BlockCost(forward_s=seconds, input_bytes=10, attention_bytes=20, rest_bytes=100, kept_bytes=kept)


@pytest.mark.parametrize(
    ("seconds", "rate", "host", "alpha"),
    [(1, 80, 1e9, 0.5), (1, 1000, 1e9, 1.0), (1, 10, 1e9, 0.0), (1, 1000, 55, 0.25), (2, 40, 1e9, 0.5)],
)
def test_alpha_is_what_hides_and_fits(seconds: float, rate: float, host: float, alpha: float) -> None:
    costs = [cost(0.5 * seconds), cost(1.5 * seconds)]
    assert choose_alpha(costs, link_bytes_per_s=rate, host_bytes=2 * host) == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("host_bytes", "keep_last", "modes"),
    [
        (60, 1, ["swap", "swap", "keep"]),
        (59, 1, ["input", "input", "keep"]),
        (30, 0, ["input", "input", "input"]),
        (29, 0, ["input", "input", "recompute"]),
        (9, 0, ["recompute", "recompute", "recompute"]),
    ],
)
def test_without_room_in_host_memory_inputs_leave_alone_or_nothing(
    host_bytes: int, keep_last: int, modes: list[str]
) -> None:
    chosen = choose([cost()] * 3, link_bytes_per_s=1000, host_bytes=host_bytes, keep_last=keep_last)
    assert [choice.mode for choice in chosen] == modes
    assert all(choice.alpha == 0 for choice in chosen)


def test_memory_left_on_the_device_keeps_the_last_blocks() -> None:
    def modes(gpu_bytes: int) -> list[str]:
        return [c.mode for c in choose([cost(kept=200)] * 6, link_bytes_per_s=80, gpu_bytes=gpu_bytes, keep_last=2)]

    assert modes(799 + 200) == ["swap"] * 3 + ["keep"] * 3
    assert modes(800 + 200) == ["swap"] * 2 + ["keep"] * 4


def test_no_more_blocks_keep_than_may() -> None:
    chosen = choose([cost(kept=200)] * 6, link_bytes_per_s=80, gpu_bytes=10_000, keep_last=0, keep_most=2)
    assert [choice.mode for choice in chosen] == ["swap"] * 4 + ["keep"] * 2


def test_without_rounding_all_products_are_swapped_or_none() -> None:
    for rate, alpha in ((129, 0.0), (130, 1.0)):
        assert choose([cost()] * 3, link_bytes_per_s=rate, keep_last=0, step=1) == [Choice("swap", alpha)] * 3


def test_products_are_swapped_only_where_the_device_has_room_for_those_under_way() -> None:
    """Twice those of one block, see [Note: what swapping takes on the device]."""
    for gpu_bytes, alpha in ((199, 0.0), (200, 0.5), (None, 0.5)):
        chosen = choose([cost(kept=300)] * 6, link_bytes_per_s=80, gpu_bytes=gpu_bytes, keep_last=0)
        assert chosen == [Choice("swap", alpha)] * 6


@given(
    st.lists(st.tuples(*[st.integers(0, 10**9)] * 3, st.floats(1e-3, 10)), min_size=1, max_size=12),
    st.floats(1e6, 1e11),
    st.none() | st.integers(0, 10**10),
)
def test_no_choice_takes_more_than_there_is(blocks, rate: float, host: int | None) -> None:
    costs = [BlockCost(input_bytes=a, attention_bytes=b, rest_bytes=c, forward_s=s) for a, b, c, s in blocks]
    chosen = choose(costs, link_bytes_per_s=rate, host_bytes=host, keep_last=0)
    assert len(chosen) == len(costs)
    inputs = [c.input_bytes for c, choice in zip(costs, chosen, strict=True) if choice.mode == "input"]
    assert host is None or len(inputs) * max(inputs, default=0) <= host
    swaps = [(c, choice.alpha) for c, choice in zip(costs, chosen, strict=True) if choice.mode == "swap"]
    assert not (inputs and swaps)
    if not swaps:
        return
    taken = [c.least_bytes + alpha * c.rest_bytes for c, alpha in swaps]
    assert host is None or len(swaps) * max(taken) <= host * (1 + 1e-9)  # slots are equal
    assert len({alpha for _, alpha in swaps}) == 1 and 0 <= swaps[0][1] <= 1
    hidden = sum(taken) <= rate * sum(c.forward_s for c, _ in swaps) * (1 + 1e-9)
    assert hidden or swaps[0][1] == 0 or not any(c.rest_bytes for c, _ in swaps)


def test_auto_measures_and_then_chooses() -> None:
    expected, model = gradients(llama(), *batch()), llama()
    swap = leaving(model, "auto", None)
    for _ in range(3):
        assert_equal(gradients(model, *batch()), expected)
        assert swap.choices[0] == Choice("swap", 0.0)
    for a, b in zip(gradients(model, *batch()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    tokens, o = 2 * SEQ, OPTIONS
    found = swap.costs()[0]
    assert found.input_bytes == 4 * tokens * o.dim
    assert found.rest_bytes == 4 * tokens * (128 + 64 + 2 * o.ffn_dim)
    assert found.kept_bytes == kept_by_a_block()
    assert swap.choices[0].alpha > 0, "a copy in memory is faster than a block"


def test_what_is_left_over_is_of_what_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`offload.device_bytes`, where that is less than the device has."""
    limits: list[int | None] = []
    monkeypatch.setattr("offload.activations.blocks.spare_bytes", lambda _, limit: limits.append(limit))
    model = llama()
    Activations(ActivationOptions(mode="auto"), CPU, device_bytes=10**9, poison=True).wrap(model.blocks())
    for _ in range(4):
        gradients(model, *batch())
    assert limits == [10**9]


@pytest.mark.gpu
def test_what_is_left_over_on_a_gpu() -> None:
    device = torch.device("cuda")
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    most, spare = torch.cuda.max_memory_reserved(device), spare_bytes(device)
    assert held.nbytes <= most and spare is not None
    limit = most + 2**30
    assert spare_bytes(device, limit) == min(spare, int(GPU_SHARE * limit) - most)
    assert spare_bytes(device, most) == 0


@pytest.mark.parametrize(("same_bits", "alpha"), [(False, 0.5), (True, 0.0)])
def test_auto_swaps_all_products_or_none_where_bits_matter(
    same_bits: bool, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As products of fewer rows may round differently, and α follows times, which are others in each run."""
    monkeypatch.setattr("offload.activations.blocks.link_bytes_per_s", lambda _: 80.0)
    model = llama()
    swap = leaving(model, "auto", None)
    monkeypatch.setattr(swap, "costs", lambda: [cost()] * (LAYERS - 2))
    with deterministic(same_bits):
        for _ in range(4):
            gradients(model, *batch())
    assert swap.choices[0] == Choice("swap", alpha)


@pytest.mark.parametrize(("num_inputs", "mode"), [(LAYERS - 1, "input"), (LAYERS - 2, "recompute")])
@pytest.mark.parametrize("most_tokens", [None, 4 * SEQ])
def test_auto_swaps_inputs_alone_where_host_memory_holds_no_more(
    num_inputs: int, mode: str, most_tokens: int | None
) -> None:
    """From the first step on, in which nothing is measured: `mode` is that of the last block that does not keep."""
    expected, model = gradients(llama(), *batch()), llama()
    host_bytes = (2 if most_tokens else 1) * num_inputs * leaves_bytes("input") + 1000
    options = ActivationOptions(mode="auto", host_bytes=host_bytes, keep_last=1)
    said: list[str] = []
    swap = Activations(options, CPU, most_tokens=most_tokens, say=said.append, poison=True)
    swap.wrap(model.blocks())
    for _ in range(5):
        assert_equal(gradients(model, *batch()), expected)
        chosen = [choice.mode for choice in swap.choices]
        assert chosen == ["input"] * num_inputs + [mode] * (LAYERS - 1 - num_inputs) + ["keep"]
    assert swap.costs()[0].attention_bytes == leaves_bytes("attention"), "known, though it is not stored"
    assert f"activations: {num_inputs} blocks swap their input alone" in said[0]
