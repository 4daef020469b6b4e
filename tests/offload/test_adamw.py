import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.adamw import State, accumulate, adamw, copy, sum_of_squares
from offload.hostpool import SOURCES, HostPool
from offload.native import FLAGS, load_native

BF16, FP32 = torch.bfloat16, torch.float32
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def placed(values: Tensor, shift: int) -> Tensor:
    """The same values, `shift` elements after an aligned address."""
    return torch.cat([values.new_zeros(shift), values])[shift:]


def state_of(numel: int, shift: int = 0, seed: int = 0) -> State:
    made = torch.Generator().manual_seed(seed)
    master, exp_avg, exp_avg_sq = (torch.randn(numel, generator=made) for _ in range(3))
    return placed(master, shift), placed(exp_avg * 1e-2, shift), placed(exp_avg_sq**2 * 1e-4, shift)


def grad_of(numel: int, dtype: torch.dtype = BF16, seed: int = 1) -> Tensor:
    return (torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 1e-2).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_int = torch.int16 if a.dtype == BF16 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


def updated(
    pool: HostPool,
    numel: int,
    *,
    grad_dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype | None = BF16,
    scale: float = 0.7,
) -> list[Tensor]:
    state, weight = state_of(numel), None if weight_dtype is None else torch.empty(numel, dtype=weight_dtype)
    adamw(*state, grad_of(numel, grad_dtype), weight, scale=scale, updates=3, pool=pool, **HYPER)
    return [*state] if weight is None else [*state, weight]


@pytest.mark.parametrize("weight_dtype", [None, BF16, FP32])
@pytest.mark.parametrize("grad_dtype", [BF16, FP32])
def test_c_and_torch_give_the_same_bits(
    pool: HostPool, torch_pool: HostPool, grad_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    for numel in (1, 15, 16, 17, 65_537, 300_001):
        ours, oracle = (updated(p, numel, grad_dtype=grad_dtype, weight_dtype=weight_dtype) for p in (pool, torch_pool))
        assert all(same_bits(a, b) for a, b in zip(ours, oracle, strict=True))


@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_every_width_of_vector_gives_the_same_bits(pool: HostPool, architecture: str, tmp_path: Path) -> None:
    flags = [f"-march={architecture}" if flag == "-march=native" else flag for flag in FLAGS]
    library = load_native("other", SOURCES, flags)
    lanes = {"x86-64": 1, "x86-64-v3": 8, "x86-64-v4": 16}[architecture]
    if lanes == 16 and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    assert library.atoll_lanes() == lanes
    with HostPool(2) as other:
        for name in ("open", "close"):  # the pool's threads come from the same library
            getattr(library, f"atoll_pool_{name}").argtypes = getattr(pool._library, f"atoll_pool_{name}").argtypes
            getattr(library, f"atoll_pool_{name}").restype = getattr(pool._library, f"atoll_pool_{name}").restype
        for name in ("adamw", "squares"):
            getattr(library, f"atoll_{name}").argtypes = getattr(pool._library, f"atoll_{name}").argtypes
        other._end()
        other._library, other._handle = library, library.atoll_pool_open(2, None, 0)
        for a, b in zip(updated(other, 70_003), updated(pool, 70_003), strict=True):
            assert same_bits(a, b)
        values = grad_of(50_001)
        assert sum_of_squares(values, pool=other) == sum_of_squares(values, pool=pool)
        library.atoll_pool_close(other._handle)


@pytest.mark.parametrize("weight_dtype", [BF16, FP32])
@pytest.mark.parametrize("grad_dtype", [BF16, FP32])
@pytest.mark.parametrize("shift", [0, 3])
def test_the_weight_alone_and_then_the_states_give_the_same_bits(
    pool: HostPool, torch_pool: HostPool, grad_dtype: torch.dtype, weight_dtype: torch.dtype, shift: int
) -> None:
    numel = 200_003
    *new, weight = updated(pool, numel, grad_dtype=grad_dtype, weight_dtype=weight_dtype)
    for each in (pool, torch_pool):
        state, grad = state_of(numel, shift), placed(grad_of(numel, grad_dtype), shift)
        before, alone = [values.clone() for values in state], placed(torch.zeros(numel, dtype=weight_dtype), shift)
        adamw(*state, grad, alone, scale=0.7, updates=3, weight_alone=True, pool=each, **HYPER)
        assert same_bits(alone, weight) and all(map(same_bits, state, before))
        adamw(*state, grad, None, scale=0.7, updates=3, pool=each, **HYPER)
        assert all(map(same_bits, state, new))


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 200_000),
    cuts=st.lists(st.integers(0, 200_000), max_size=4),
    shifts=st.tuples(*[st.integers(0, 40)] * 5),
    apart=st.booleans(),
    threads=st.integers(1, 5),
)
def test_bits_depend_on_nothing_but_the_element(
    pool: HostPool, numel: int, cuts: list[int], shifts: tuple[int, ...], apart: bool, threads: int
) -> None:
    whole = updated(pool, numel)
    state = tuple(placed(values, shift) for values, shift in zip(state_of(numel), shifts, strict=False))
    grad, weight = placed(grad_of(numel), shifts[3]), placed(torch.empty(numel, dtype=BF16), shifts[4])
    out = tuple(placed(torch.full((numel,), math.nan), shift) for shift in shifts[2:]) if apart else state
    before = [values.clone() for values in state]
    edges = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    with HostPool(threads) as mine:
        for start, stop in zip(edges, edges[1:], strict=False):
            part = slice(start, stop)
            adamw(
                *(values[part] for values in state), grad[part], weight[part], scale=0.7, updates=3, pool=mine,
                out=(out[0][part], out[1][part], out[2][part]) if apart else None, **HYPER,
            )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip((*out, weight), whole, strict=True))
    assert not apart or all(same_bits(a, b) for a, b in zip(state, before, strict=True)), "the version before changed"


def test_twenty_updates_agree_with_torch(pool: HostPool) -> None:
    state, numel = state_of(100_003), 100_003
    for values in state[1:]:
        values.zero_()
    parameter = torch.nn.Parameter(state[0].clone())
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for updates in range(1, 21):
        grad = grad_of(numel, FP32, seed=updates)
        parameter.grad = grad.clone()
        optimizer.step()
        adamw(*state, grad, None, updates=updates, pool=pool, **HYPER)
    torch.testing.assert_close(state[0], parameter.detach(), rtol=1e-6, atol=1e-7)
    moments = optimizer.state[parameter]
    torch.testing.assert_close(state[1], moments["exp_avg"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(state[2], moments["exp_avg_sq"], rtol=2e-6, atol=0)


def test_a_bf16_weight_is_rounded_to_nearest_even(pool: HostPool) -> None:
    bits = torch.arange(-(2**31), 2**31 - 1, 65_521 // 7, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0x3F80_8000, 0x3F90_8000, 0x1_0000, dtype=torch.int64).to(torch.int32)
    master = torch.cat([bits, ties]).view(FP32)
    zeros, weight = torch.zeros_like(master), torch.empty(master.numel(), dtype=BF16)
    still = {**HYPER, "lr": 0.0}
    adamw(master.clone(), zeros.clone(), zeros.clone(), zeros, weight, updates=1, pool=pool, **still)
    assert torch.equal(weight.isnan(), master.isnan()) and weight.isnan().any() and weight.isinf().any()
    assert same_bits(weight[~weight.isnan()], master.to(BF16)[~weight.isnan()])


def test_the_weight_may_take_the_place_of_the_gradient(pool: HostPool) -> None:
    state, grad = state_of(100_001), grad_of(100_001)
    adamw(*state, grad, grad, scale=0.7, updates=3, pool=pool, **HYPER)
    assert all(same_bits(a, b) for a, b in zip([*state, grad], updated(pool, 100_001), strict=True))


def test_denormals_are_kept_though_torch_flushes_them(pool: HostPool) -> None:
    total, addend = torch.tensor([1e-40]), torch.tensor([1e-40])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        with HostPool(2) as inherited:
            accumulate(total, addend, pool=inherited)
    finally:
        torch.set_flush_denormal(False)
    assert total.item() > 1.9e-40


@settings(max_examples=40, deadline=None)
@given(numel=st.integers(0, 150_000), shift=st.integers(0, 33), threads=st.integers(1, 4), bf16=st.booleans())
def test_the_sum_of_squares_is_the_same_on_any_threads_and_address(
    pool: HostPool, numel: int, shift: int, threads: int, bf16: bool
) -> None:
    values = grad_of(numel, BF16 if bf16 else FP32)
    found = sum_of_squares(values, pool=pool)
    with HostPool(threads) as mine:
        assert sum_of_squares(placed(values, shift), pool=mine) == found
    assert found == pytest.approx(math.fsum((values.double() ** 2).tolist()), rel=1e-14)


def test_torch_sums_squares_to_the_same_bits(pool: HostPool, torch_pool: HostPool) -> None:
    for numel, dtype in ((0, FP32), (3, BF16), (16_384, FP32), (16_385, BF16), (600_001, BF16)):
        values = grad_of(numel, dtype)
        assert sum_of_squares(values, pool=torch_pool) == sum_of_squares(values, pool=pool)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_sum_of_squares_shows_one_bad_element(pool: HostPool, bad: float) -> None:
    values = grad_of(100_000)
    assert math.isfinite(sum_of_squares(values, pool=pool))
    values[77_777] = bad
    assert not math.isfinite(sum_of_squares(values, pool=pool))


def test_huge_elements_do_not_overflow_the_sum(pool: HostPool) -> None:
    assert sum_of_squares(torch.full((50_000,), 3e38), pool=pool) == pytest.approx(50_000 * 9e76, rel=1e-6)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_accumulate_adds_each_element_once(pool: HostPool, torch_pool: HostPool, dtype: torch.dtype) -> None:
    addend, start = grad_of(130_001, dtype), state_of(130_001)[0]
    for which in (pool, torch_pool):
        total = placed(start, 3)
        accumulate(total, addend, pool=which)
        assert same_bits(total, start + addend.float())


@pytest.mark.parametrize("shift", [0, 1, 31])
def test_copy_copies_every_byte_and_no_more(pool: HostPool, torch_pool: HostPool, shift: int) -> None:
    source = torch.randint(0, 256, (3_000_001,), dtype=torch.uint8)
    for which in (pool, torch_pool):
        into = torch.zeros(3_000_100, dtype=torch.uint8)
        copy(into[shift : shift + source.numel()], source, pool=which)
        assert torch.equal(into[shift : shift + source.numel()], source)
        assert not into[:shift].any() and not into[shift + source.numel() :].any()


def test_tensors_of_the_wrong_kind_are_refused(pool: HostPool) -> None:
    state, grad = state_of(8), grad_of(8)
    for arguments, said in (
        ((*state, grad.half(), None), r"grad: torch\.float16 \[8\].*bfloat16"),
        ((*state, grad[:7], None), r"grad: torch\.bfloat16 \[7\].*must be \[8\]"),
        ((state[0].double(), *state[1:], grad, None), r"master: torch\.float64"),
        ((*state, grad_of(16)[::2], None), r"strides \(2,\)"),
        ((*state, grad, torch.empty(2, 4, dtype=BF16)), r"weight: .*\[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=said):
            adamw(*arguments, updates=1, pool=pool, **HYPER)
    with pytest.raises(ValueError, match="updates=0"):
        adamw(*state, grad, None, updates=0, pool=pool, **HYPER)


def test_a_weight_alone_leaves_the_gradient_and_needs_a_place(pool: HostPool) -> None:
    state, grad = state_of(8), grad_of(8)
    with pytest.raises(ValueError, match="overlaps"):
        adamw(*state, grad, grad, updates=1, weight_alone=True, pool=pool, **HYPER)
    for weight, out in ((None, None), (grad.clone(), state_of(8))):
        with pytest.raises(ValueError, match="give a weight, and no `out`"):
            adamw(*state, grad, weight, updates=1, out=out, weight_alone=True, pool=pool, **HYPER)


def test_outputs_that_overlap_in_part_are_refused(pool: HostPool) -> None:
    slab, state = torch.zeros(100), state_of(20)
    for out in (
        (slab[0:20], slab[10:30], slab[40:60]),  # each other
        (slab[0:20], slab[0:20], slab[40:60]),
    ):
        with pytest.raises(ValueError, match="overlaps"):
            adamw(*state, grad_of(20), None, updates=1, out=out, pool=pool, **HYPER)
    with pytest.raises(ValueError, match="overlaps"):
        adamw(slab[0:20], slab[30:50], slab[60:80], grad_of(20), None, updates=1, pool=pool,
              out=(slab[10:30], state[1], state[2]), **HYPER)  # fmt: skip
