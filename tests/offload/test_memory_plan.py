"""The memory plan: placements against brute force and worked cases, recordings against the profiler, both levels."""

import itertools
import random
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offload.plan import (
    Head,
    Layer,
    Recorder,
    Request,
    check_fits,
    flat_requests,
    growing,
    load_bytes,
    place,
    plan_step,
    record_head,
    record_layer,
    timeline,
)
from trainer.models.llama import Block, rotary_tables
from trainer.models.llama import Head as LlamaHead
from trainer.options import LlamaOptions

BLOCK = LlamaOptions(dim=64, ffn_dim=192, num_heads=4, num_kv_heads=2, head_dim=16)


def requests_of(*lives: tuple[int, int, int]) -> list[Request]:
    """(size, first, last) each."""
    return [Request(f"r{i}", f"owner{i % 3}", *life) for i, life in enumerate(lives)]


lives = st.tuples(st.integers(1, 3000), st.integers(0, 12), st.integers(0, 6))
request_lists = st.lists(lives, max_size=14).map(lambda many: requests_of(*((s, a, a + d) for s, a, d in many)))


def overlapping(requests: list[Request], offsets: tuple[int, ...]) -> list[tuple[str, str]]:
    placed = list(zip(requests, offsets, strict=True))
    return [
        (a.name, b.name)
        for (a, x), (b, y) in itertools.combinations(placed, 2)
        if max(a.first, b.first) <= min(a.last, b.last) and x < y + b.size_bytes and y < x + a.size_bytes
    ]


def fits(requests: list[Request], height: int) -> bool:
    """Whether offsets put all within `height`, no two wanted at once sharing a byte: every one is tried."""
    order = sorted(requests, key=lambda r: -r.size_bytes)

    def put(placed: list[tuple[Request, int]]) -> bool:
        if len(placed) == len(order):
            return True
        r = order[len(placed)]
        return any(
            put([*placed, (r, x)])
            for x in range(height - r.size_bytes + 1)
            if all(x >= y + s.size_bytes or y >= x + r.size_bytes or not r.meets(s) for s, y in placed)
        )

    return put([])


# ---------------------------------------------------------------------------------------------------- placing


@given(request_lists, st.sampled_from([1, 64, 512]))
@settings(max_examples=60, deadline=None)
def test_no_two_requests_wanted_at_once_overlap(requests: list[Request], align: int) -> None:
    found = place(requests, align=align, time_limit_s=0.2)
    assert overlapping(requests, found.offsets) == []
    assert all(offset % align == 0 for offset in found.offsets)
    ends = [o + r.size_bytes for o, r in zip(found.offsets, requests, strict=True)]
    assert max(ends, default=0) <= found.size_bytes
    assert load_bytes(requests, align) <= found.lower_bound_bytes <= found.size_bytes


@given(request_lists)
@settings(max_examples=30, deadline=None)
def test_the_same_requests_give_the_same_plan(requests: list[Request]) -> None:
    assert place(requests, time_limit_s=0) == place(requests, time_limit_s=0)


def test_it_is_the_smallest_where_it_says_so() -> None:
    pytest.importorskip("highspy")
    generator, solved = random.Random(5), 0
    for _ in range(300):
        starts = [generator.randint(0, 8) for _ in range(7)]
        requests = requests_of(*((generator.randint(1, 5), a, a + generator.randint(0, 5)) for a in starts))
        found = place(requests, align=1, rounds=0)
        assert found.proven, found.solver
        if "MIP" in found.solver:
            solved += 1
            assert fits(requests, found.size_bytes)
            assert not fits(requests, found.size_bytes - 1)
    assert solved, "best fit alone was enough"


GREEDY_FAILS = [
    requests_of((3, 6, 8), (4, 2, 5), (2, 7, 8), (3, 2, 7), (3, 2, 2), (2, 3, 7)),
    requests_of((4, 1, 6), (4, 2, 3), (5, 5, 5), (6, 6, 7), (5, 5, 8), (4, 0, 5)),
    requests_of((3, 0, 2), (5, 4, 8), (3, 6, 6), (2, 0, 3), (6, 2, 4), (1, 1, 5), (2, 2, 3), (1, 3, 7)),
]


@pytest.mark.parametrize("requests", GREEDY_FAILS)
def test_the_program_finds_what_best_fit_does_not(requests: list[Request]) -> None:
    pytest.importorskip("highspy")
    greedy, both = place(requests, align=1, time_limit_s=0), place(requests, align=1)
    assert greedy.size_bytes > greedy.lower_bound_bytes
    assert both.size_bytes == both.lower_bound_bytes
    assert "MIP" in both.solver
    assert overlapping(requests, both.offsets) == []


def test_a_bound_that_cannot_be_met_is_raised() -> None:
    """At most 5 are wanted at once, yet no offsets do with less than 6."""
    pytest.importorskip("highspy")
    requests = requests_of(
        (1, 1, 4), (2, 4, 5), (1, 1, 5), (3, 0, 2), (3, 8, 8), (2, 5, 8), (1, 3, 4), (2, 0, 0), (1, 3, 3), (1, 6, 6)
    )  # fmt: skip
    found = place(requests, align=1)
    assert load_bytes(requests) == 5
    assert (found.size_bytes, found.lower_bound_bytes) == (6, 6)
    assert "proves" in found.solver
    assert fits(requests, 6)
    assert not fits(requests, 5)


def test_without_a_solver_the_plan_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    found = place(GREEDY_FAILS[0], align=1)
    assert "pip install highspy" in found.solver
    assert "pip install highspy" in caplog.text
    assert not found.proven


def test_nothing_takes_nothing() -> None:
    found = place([])
    assert (found.offsets, found.size_bytes, found.proven) == ((), 0, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request("a", "o", 0, 0, 1), "must be 1 or more"),
        (lambda: Request("a", "o", 1, 3, 2), "must not end before it starts"),
        (lambda: place([Request("a", "o", 1, 0, 0)] * 2), "each must have its own name"),
        (lambda: place([], align=0), "must be 1 or more"),
        (lambda: place([], time_limit_s=-1), "none may be negative"),
        (lambda: check_fits(requests_of((4, 0, 1), (4, 1, 2)), (0, 2), 8), "overlap from step 1"),
        (lambda: check_fits(requests_of((4, 0, 1)), (6,), 8), "must be within 0 to 8"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(request_lists)
@settings(max_examples=30, deadline=None)
def test_the_timeline_peaks_at_the_load(requests: list[Request]) -> None:
    assert max((sum(held.values()) for _, held in timeline(requests)), default=0) == load_bytes(requests)


# ---------------------------------------------------------------------------------------------------- lengths


def test_a_plan_for_the_longest_serves_shorter_ones() -> None:
    recorded = {n: record(n) for n in (16, 48, 128)}
    few, many = (all_requests(recorded[n]) for n in (16, 128))
    grown = growing(few, 16, many, 128)
    plan = place([g.at(128) for g in grown])
    for num_tokens in range(1, 129):
        shorter = [g.at(num_tokens) for g in grown]
        check_fits(shorter, plan.offsets, plan.size_bytes)
        assert overlapping(shorter, plan.offsets) == []
    middle = {r.name: r.size_bytes for r in all_requests(recorded[48])}
    assert {g.name: g.at(48).size_bytes for g in grown} == middle


@pytest.mark.parametrize(
    ("large", "message"),
    [
        (requests_of((8, 0, 2)), "must be alike but for size"),
        (requests_of((9, 0, 1), (1, 0, 0)), "in more than size"),
        (requests_of((5, 0, 1)), "fixed \\+ bytes a token"),
    ],
)
def test_sizes_that_are_not_affine_are_refused(large: list[Request], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        growing(requests_of((4, 0, 1)), 2, large, 4)


# ---------------------------------------------------------------------------------------------------- recording


def block_and_input(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    cpu = torch.device("cpu")
    with torch.device(cpu):
        cos, sin = rotary_tables(num_tokens, BLOCK.head_dim, BLOCK.rope_theta, cpu)
        x = torch.randn(1, num_tokens, BLOCK.dim, dtype=dtype)
    return Block(BLOCK, device=cpu, dtype=dtype), (x, cos, sin)


def record(num_tokens: int, dtype: torch.dtype = torch.float32) -> Layer:
    with FakeTensorMode():
        block, inputs = block_and_input(num_tokens, dtype)
        return record_layer(block, *inputs)


def all_requests(layer: Layer) -> list[Request]:
    """Those of one layer, forward and then backward."""
    later = [replace(r, first=r.first + layer.num_forward, last=r.last + layer.num_forward) for r in layer.backward]
    return [*layer.forward, *layer.saved, *later]


def test_a_recorded_mlp_is_what_arithmetic_says() -> None:
    """4 x 8 fp32 in, 32 hidden: the backward needs the input (outside) and the two hidden tensors."""
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    layer = record_layer(model, torch.randn(4, 8))
    assert [r.size_bytes for r in layer.saved] == [4 * 32 * 4]  # ReLU saves its result, which the last matrix reads too
    assert [r.size_bytes for r in layer.forward] == [4 * 32 * 4]  # what ReLU reads
    assert sorted(r.size_bytes for r in layer.gradients) == [8 * 32 * 4, 8 * 32 * 4]
    assert layer.input_bytes == 4 * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_peak_is_the_profilers(dtype: torch.dtype) -> None:
    block, (x, *others) = block_and_input(96, dtype)
    x.requires_grad_()

    def step() -> None:
        with recorder.phase("step"):
            torch.autograd.grad(block(x, *others).sum(), [x, *block.parameters()])

    with Recorder(block) as recorder:
        step()
    recorded = load_bytes(recorder.requests())
    recorder.phases.clear()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    measured = max(itertools.accumulate(changes))
    assert recorded == pytest.approx(measured, rel=0.02)


def test_nothing_need_be_computed_to_record() -> None:
    """Fake tensors take more operators, on sizes alone; they make the same tensors, as many of them at once."""
    block, inputs = block_and_input(96)
    computed, faked = record_layer(block, *inputs), record(96)
    for kind in ("forward", "saved", "backward", "gradients"):
        real, fake = (
            [(r.name.partition(":")[2], r.owner, r.size_bytes) for r in getattr(layer, kind)]
            for layer in (computed, faked)
        )
        assert real == fake, kind
    assert load_bytes(all_requests(computed)) == load_bytes(all_requests(faked))


def test_a_request_names_the_module_that_made_it() -> None:
    owners = {r.owner for r in record(32).saved}
    assert "forward/module/mlp/gate_up" in owners
    assert "forward/module/attention" in owners


# ---------------------------------------------------------------------------------------------------- two levels


def llama_step(num_tokens: int, *, swap: bool) -> tuple[Layer, Head]:
    layer = record(num_tokens)
    with FakeTensorMode():
        cpu = torch.device("cpu")
        head = LlamaHead(BLOCK, 512, device=cpu, dtype=torch.float32)
        last = record_head(head, torch.randn(1, num_tokens, BLOCK.dim), torch.zeros(1, num_tokens, dtype=torch.int64))
    if swap:
        layer = replace(layer, swap_input=True, swap_saved=frozenset(r.name for r in layer.saved))
    return layer, last


@pytest.mark.parametrize("swap", [False, True])
def test_every_tensor_of_a_step_has_a_place_of_its_own(swap: bool) -> None:
    layer, head = llama_step(64, swap=swap)
    layers = [layer] * 5
    plan = plan_step(layers, head)
    offsets = plan.offsets()
    flat = flat_requests(layers[:3] + [x.kept() for x in layers[3:]], head)
    check_fits(flat, [offsets[r.name] for r in flat], plan.step.size_bytes)
    assert overlapping(list(flat), tuple(offsets[r.name] for r in flat)) == []


@pytest.mark.timed
def test_eighty_layers_take_seconds_and_are_near_the_bound() -> None:
    layer, head = llama_step(256, swap=True)
    start = time.perf_counter()
    plan = plan_step([layer] * 80, head)
    assert time.perf_counter() - start < 10
    assert plan.num_solved == 3  # a forward, a backward, the head: equal layers share one
    assert plan.step.waste <= 0.02
    assert plan.flat_bound_bytes <= plan.step.size_bytes


def test_swapping_frees_what_it_says() -> None:
    """Of 20 layers the last two are kept; the others' activations leave, but for two buffers in flight."""
    kept, head = llama_step(256, swap=False)
    swapped, _ = llama_step(256, swap=True)
    saved = sum(r.size_bytes for r in kept.saved) + kept.input_bytes
    freed = plan_step([kept] * 20, head).step.size_bytes - plan_step([swapped] * 20, head).step.size_bytes
    assert freed == pytest.approx((20 - 2 - 2) * saved, abs=2 * saved)


def test_a_name_to_swap_that_is_not_saved_is_refused() -> None:
    with pytest.raises(ValueError, match="what is saved"):
        replace(record(16), swap_saved=frozenset({"nothing"}))


def test_a_step_needs_layers() -> None:
    _, head = llama_step(16, swap=False)
    with pytest.raises(ValueError, match="one or more"):
        plan_step([], head)
