"""Activations that leave: the gradients are those of blocks that keep everything, in far less memory on the device.

On CPU the same code runs as on a GPU, each copy done when it is asked for. Memory is poisoned when it is given back.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offload.activations import Activations
from offload.activations_memory import POISON
from offload.activations_plan import BlockCost, Choice, choose, choose_alpha
from offload.hostpool import HostPool
from offload.options import ActivationOptions
from offload.plan import Recorder
from tests.offload.leaving import llama_of, nothing_grows
from trainer.models.llama import Llama
from trainer.options import LlamaOptions

CPU = torch.device("cpu")
LAYERS, SEQ = 5, 48
OPTIONS = LlamaOptions(dim=64, ffn_dim=192, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=16)
SWAPPED = [("swap", 1.0), ("swap", 0.0), ("recompute", None), ("input", None)]


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


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_dropout_drops_the_same_again(alpha: float) -> None:
    found = []
    for away in (False, True):
        torch.manual_seed(3)
        model, x = Chain([Noisy() for _ in range(3)]), torch.randn(2, 32, 32)
        if away:
            leaving(model, "swap", alpha, keep_last=0)
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


# ---------------------------------------------------------------------------------------------------- choosing


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


def leaves_bytes(kind: str) -> int:
    """Of a block in fp32: input, or attention's output and log-sum-exp."""
    o = OPTIONS
    return 4 * 2 * SEQ * (o.dim if kind == "input" else o.num_heads * (o.head_dim + 1))


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


# ---------------------------------------------------------------------------------------------------- on a GPU

LARGE = LlamaOptions(dim=512, ffn_dim=1536, num_layers=12, num_heads=8, num_kv_heads=4, head_dim=64)


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
