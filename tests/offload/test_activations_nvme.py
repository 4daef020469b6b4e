"""Activations that go on to a drive, where host memory is short: the same gradients, no old bytes, and clear errors.

Slots are poisoned when their data has been stored, and when it has been read. The drive is a real one.
"""

import errno
import gc
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.activations.blocks import Activations
from offload.activations.plan import BlockCost, Choice, DriveRoom, choose
from offload.activations.slots import Drives
from offload.drive import DriveError, SystemCalls
from offload.options import ActivationOptions
from tests.offload.leaving import (
    CPU,
    LARGE,
    LAYERS,
    OPTIONS,
    SEQ,
    HFLoss,
    assert_equal,
    batch,
    give_up_in_each_block,
    gradients,
    leaves_bytes,
    llama,
    nothing_grows,
    one_thread,
)
from tests.offload.test_nvme_faults import Fault, first_bytes, raising
from tests.offload.tier_conformance import PAGE
from trainer.models.llama import Llama

__all__ = ["one_thread"]
MODES = [("swap", 1.0), ("swap", 0.0), ("input", None)]


def slot_bytes(mode: str, alpha: float | None, tokens: int = 2 * SEQ, itemsize: int = 4) -> int:
    """Of one block of OPTIONS, as it is rounded."""
    o = OPTIONS
    sums = tokens * o.num_heads * 4
    attention = tokens * o.num_heads * o.head_dim * itemsize + sums
    products = tokens * itemsize * (o.num_heads * o.head_dim + 2 * o.num_kv_heads * o.head_dim + o.dim + 2 * o.ffn_dim)
    size = tokens * o.dim * itemsize
    size += 0 if mode == "input" else attention + int((alpha or 0) * products)
    return -(-size // PAGE) * PAGE


def leaving(
    model: Any,
    folder: Path,
    mode: str = "swap",
    alpha: float | None = 0.0,
    *,
    slots: int = 2,
    each: int | None = None,
    keep_last: int = 0,
    most_tokens: int | None = None,
    **drives: Any,
) -> Activations:
    """slots: of `each` bytes, that host memory holds."""
    host_bytes = slots * (each or slot_bytes(mode, alpha))
    options = ActivationOptions(mode=mode, alpha=alpha, host_bytes=host_bytes, keep_last=keep_last)
    made = Activations(
        options, next(model.parameters()).device, most_tokens=most_tokens,
        drives=Drives(folders=[folder], **drives), poison=True,
    )  # fmt: skip
    made.wrap(model.blocks())
    return made


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("mode", "alpha"), MODES)
@pytest.mark.parametrize(("slots", "keep_last"), [(2, 0), (3, 1)])
def test_gradients_are_bitwise_those_of_blocks_that_keep_all(
    disk_folder: Path, mode: str, alpha: float | None, slots: int, keep_last: int
) -> None:
    expected, model = gradients(llama(), *batch()), llama()
    swap = leaving(model, disk_folder, mode, alpha, slots=slots, keep_last=keep_last)
    for _ in range(3):
        assert_equal(gradients(model, *batch()), expected)
    each, on_drive = slot_bytes(mode, alpha), LAYERS - keep_last - slots
    assert swap.pools.size_bytes()["host"] == slots * each and swap.pools.size_bytes()["nvme"] == on_drive * each
    swap.close()
    assert swap.pools.written_bytes == 3 * on_drive * each


def test_gradients_in_bf16(disk_folder: Path) -> None:
    expected, model = gradients(llama(torch.bfloat16), *batch()), llama(torch.bfloat16)
    swap = leaving(model, disk_folder, each=slot_bytes("swap", 0.0, itemsize=2))
    for _ in range(2):
        assert_equal(gradients(model, *batch()), expected)
    assert swap.pools.written_bytes > 0
    swap.close()


def test_gradients_accumulate_over_micro_batches(disk_folder: Path) -> None:
    plain, model = llama(), llama()
    swap = leaving(model, disk_folder)
    for _ in range(3):
        for one in (plain, model):
            one(*batch()).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    swap.close()


@pytest.mark.parametrize("most_tokens", [None, 4 * SEQ])
def test_lengths_may_vary(disk_folder: Path, most_tokens: int | None) -> None:
    """Where the longest is not known, longer ones make new slots, of which host memory holds fewer, and a new file."""
    plain, model = llama(), llama()
    swap = leaving(model, disk_folder, slots=4, most_tokens=most_tokens)
    sizes = []
    for length in (SEQ, SEQ // 3, SEQ, 2 * SEQ, 7, SEQ):
        assert_equal(gradients(model, *batch(length)), gradients(plain, *batch(length)))
        sizes.append(swap.pools.size_bytes()["nvme"])
    assert len(set(sizes[3:])) == 1 and sizes[-1] == (LAYERS - 2) * slot_bytes("swap", 0.0, 4 * SEQ)
    assert sizes[0] == (sizes[-1] if most_tokens else slot_bytes("swap", 0.0))
    assert swap.pools.num_buffers == 2
    swap.close()


def test_memory_is_made_anew_for_longer_ones(disk_folder: Path) -> None:
    """With the next step, whatever its length is."""
    plain, model = llama(), llama()
    swap = leaving(model, disk_folder, slots=4)
    for most_tokens, on_drive in ((2 * SEQ, LAYERS - 4), (4 * SEQ, LAYERS - 2), (2 * SEQ, LAYERS - 4)):
        swap.make_for(most_tokens)
        assert_equal(gradients(model, *batch()), gradients(plain, *batch()))
        assert swap.pools.size_bytes()["nvme"] == on_drive * slot_bytes("swap", 0.0, most_tokens)
        assert swap.pools.num_buffers == 2
    swap.close()
    assert swap.pools.written_bytes == (2 * (LAYERS - 4) + LAYERS - 2) * slot_bytes("swap", 0.0)


def test_every_block_may_choose_for_itself(disk_folder: Path) -> None:
    expected, model = gradients(llama(), *batch()), llama()
    swap = leaving(model, disk_folder)
    swap.set([Choice("swap"), Choice("recompute"), Choice("input"), Choice("keep"), Choice("swap")])
    for _ in range(2):
        assert_equal(gradients(model, *batch()), expected)
    assert swap.pools.size_bytes()["nvme"] == slot_bytes("swap", 0.0)
    swap.close()


@pytest.mark.parametrize(("mode", "alpha"), [("swap", 0.0), pytest.param("input", None, marks=pytest.mark.slow)])
def test_compiled_blocks(disk_folder: Path, mode: str, alpha: float | None) -> None:
    options = replace(OPTIONS, num_layers=4)
    kept, model = llama(options=options), llama(options=options)
    torch._dynamo.reset()
    for block in (*kept.blocks(), *model.blocks()):
        block.forward = torch.compile(block.forward, backend="aot_eager")
    host = Activations(ActivationOptions(mode=mode, alpha=alpha, keep_last=0), CPU, poison=True)
    host.wrap(kept.blocks())
    swap = leaving(model, disk_folder, mode, alpha)
    for _ in range(3):
        assert_equal(gradients(model, *batch()), gradients(kept, *batch()))
    assert swap.pools.size_bytes()["nvme"] == 2 * slot_bytes(mode, alpha)
    swap.close()
    host.close()


def test_a_graph_may_be_gone_through_twice(disk_folder: Path) -> None:
    plain, model = HFLoss("qwen3"), HFLoss("qwen3")
    swap = leaving(model, disk_folder)
    for one in (plain, model):
        loss = one(*batch())
        loss.backward(retain_graph=True)
        loss.backward()
    assert swap.pools.written_bytes > 0
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    del loss
    swap.close()


@pytest.mark.slow
def test_a_graph_that_is_dropped_gives_its_memory_back(disk_folder: Path) -> None:
    """Before its backward, and within it."""
    expected, model = gradients(llama(), *batch()), llama()
    swap = leaving(model, disk_folder)
    give_up_in_each_block(
        model,
        lambda: gradients(model, *batch()),
        lambda: model(*batch()),
        lambda: assert_equal(gradients(model, *batch()), expected),
    )
    swap._give_back()
    slots = swap.pools._slots
    assert slots is not None and len(slots.free) + len(slots._storing) == 2 and not slots._stored
    assert sorted(slots._places) == list(range(LAYERS - 2))
    swap.close()


def test_two_forwards_before_a_backward_are_refused(disk_folder: Path) -> None:
    model = llama()
    swap = leaving(model, disk_folder)
    first = model(*batch())
    with pytest.raises(MemoryError, match="before the backward of the last"):
        model(*batch())
    first.backward()
    assert_equal([p.grad for p in model.parameters()], gradients(llama(), *batch())[1:])
    del first
    swap.close()


# ---------------------------------------------------------------------------------------------------- order


class Recorded:
    """System calls on the one file, in their order: ``("write", which slot)``."""

    def __init__(self, each: int) -> None:
        self.seen: list[tuple[str, int]] = []
        self.calls = SystemCalls(preadv=self._of("read", os.preadv), pwritev=self._of("write", os.pwritev))
        self._each = each

    def _of(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        def act(handle: int, buffers: list[Any], offset: int) -> int:
            if len(buffers[0]) > PAGE:  # not the probe at the start
                self.seen.append((name, offset // self._each))
            return call(handle, buffers, offset)

        return act


def test_the_first_blocks_are_stored_and_read_back_last_first_and_ahead(disk_folder: Path) -> None:
    recorded, model = Recorded(slot_bytes("swap", 0.0)), llama()
    swap = leaving(model, disk_folder, slots=3, calls=recorded.calls)
    begun = []
    for number, block in enumerate(model.blocks()):
        block.register_forward_hook(
            lambda _, __, out, n=number: out.register_hook(lambda grad: begun.append((n, waiting()))) and None
        )

    def waiting() -> int:
        """Blocks whose data has not been asked for, when a block's backward begins."""
        assert swap.pools._slots is not None
        return len(swap.pools._slots._stored)

    gradients(model, *batch())
    stored = [place for name, place in recorded.seen if name == "write"]
    assert recorded.seen == [*(("write", p) for p in stored), *(("read", p) for p in reversed(stored))]
    assert len(stored) == LAYERS - 3
    # 4 and 3 have come back when the backward of 4 begins to compute: their slots are filled with what 1 and 0 left
    assert dict(begun)[2] == 0, begun
    swap.close()


def test_a_slow_drive_is_waited_for(disk_folder: Path) -> None:
    """And the next slot is not taken before what was in it is stored."""
    import time

    def slowly(call: Callable[..., int]) -> Callable[..., int]:
        def act(*arguments: Any) -> int:
            time.sleep(0.05)
            return call(*arguments)

        return act

    expected, model = gradients(llama(), *batch()), llama()
    swap = leaving(model, disk_folder, calls=SystemCalls(preadv=slowly(os.preadv), pwritev=slowly(os.pwritev)))
    for _ in range(2):
        assert_equal(gradients(model, *batch()), expected)
    swap.close()


@pytest.mark.parametrize("num_steps", [50, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
def test_nothing_grows(disk_folder: Path, num_steps: int) -> None:
    model = llama()
    swap = leaving(model, disk_folder)

    def state() -> tuple[Any, ...]:
        gc.collect()
        tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        threads, handles = threading.active_count(), len(os.listdir("/proc/self/fd"))
        slots = swap.pools._slots
        assert slots is not None
        return tensors, swap.pools.size_bytes(), slots.num_cut, len(slots._stored), threads, handles, len(swap._leases)

    nothing_grows(lambda: gradients(model, *batch()), state, num_steps)
    swap.close()
    assert swap.pools.written_bytes == (num_steps + 2) * (LAYERS - 2) * slot_bytes("swap", 0.0)


# ---------------------------------------------------------------------------------------------------- errors


def test_closing_leaves_no_file_thread_or_handle(disk_folder: Path) -> None:
    """The file has no name while it is used: whatever kills the process frees it."""
    handles, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    model = llama()
    swap = leaving(model, disk_folder)
    gradients(model, *batch())
    assert not list(disk_folder.iterdir()) and threading.active_count() > threads
    swap.close()
    assert set(os.listdir("/proc/self/fd")) == handles and threading.active_count() == threads


@pytest.mark.parametrize(
    ("name", "failure", "said"),
    [
        ("pwritev", raising(errno.EIO), "write of .* at offset .*Input/output error.*dmesg"),
        ("pwritev", raising(errno.ENOSPC), "No space left.*lower offload.nvme_bytes"),
        ("pwritev", lambda *_: 100, "write of .* ended after 100 bytes"),
        ("preadv", raising(errno.EIO), "read of .* at offset .*Input/output error.*last checkpoint"),
        ("preadv", lambda *_: 0, "read of .* ended after 0 bytes"),
    ],
)
def test_a_drive_that_fails_ends_the_step_with_one_error(
    disk_folder: Path, name: str, failure: Callable[..., Any], said: str
) -> None:
    handles, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    fault = Fault(getattr(os, name), failure)
    model = llama()
    swap = leaving(model, disk_folder, calls=SystemCalls(**{name: fault}))
    gradients(model, *batch())
    fault.armed = True
    with pytest.raises(DriveError, match=said) as raised:
        gradients(model, *batch())
    assert "offload.nvme_path" in str(raised.value) and str(disk_folder) in str(raised.value)
    del raised
    swap.close()
    gc.collect()  # errors hold the frames that they passed, and these the slots
    assert set(os.listdir("/proc/self/fd")) == handles and threading.active_count() == threads


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_a_short_transfer_is_continued(disk_folder: Path, name: str) -> None:
    call = getattr(os, name)
    fault = Fault(call, first_bytes(call, PAGE))
    expected, model = gradients(llama(), *batch()), llama()
    swap = leaving(model, disk_folder, calls=SystemCalls(**{name: fault}))
    fault.armed = True
    assert_equal(gradients(model, *batch()), expected)
    assert fault.times < 10**9
    swap.close()


def test_what_the_drive_may_not_or_cannot_hold_is_told_before_it_is_taken(disk_folder: Path, small_tmpfs: Path) -> None:
    each = slot_bytes("swap", 0.0)
    swap = leaving(model := llama(), disk_folder, most_bytes=3 * each - 1)
    with pytest.raises(ValueError, match=rf"offload\.nvme_bytes leaves {3 * each - 1} .*{3 * each} of it more than"):
        model(*batch())
    assert swap.pools.size_bytes()["host"] == 0
    model = llama(options=replace(OPTIONS, num_layers=90))
    leaving(model, small_tmpfs, direct=False)
    with pytest.raises(DriveError, match=r"4194304 are free.*No space left.*offload\.nvme_path"):
        model(*batch())
    leaving(model := llama(), small_tmpfs)
    with pytest.raises(ValueError, match=r"tmpfs is memory, not a drive"):
        model(*batch())


def test_one_slot_is_too_few(disk_folder: Path) -> None:
    leaving(model := llama(), disk_folder, slots=1)
    with pytest.raises(ValueError, match=r"offload\.activations\.host_bytes=\d+: 5 blocks .* two slots of host memory"):
        model(*batch())


def test_what_host_memory_holds_stays_there(disk_folder: Path) -> None:
    swap = leaving(model := llama(), disk_folder, slots=LAYERS)
    gradients(model, *batch())
    assert swap.pools.size_bytes()["nvme"] == 0
    swap.close()


# ---------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("slots", "rate", "room", "mode"),
    [
        # 6 blocks of 1 s and 30 bytes: 4 s to write what does not fit
        (4, 15.0, 60, "swap"), (4, 14.9, 60, "input"), (4, 15.0, 59, "input"), (2, 30.0, 120, "swap"),
        (2, 29.9, 120, "input"), (1, 1e9, 1e9, "input"), (6, 1e-9, 0, "swap"),
    ],
)  # fmt: skip
def test_drives_are_chosen_where_they_hide(slots: int, rate: float, room: float, mode: str) -> None:
    costs = [BlockCost(forward_s=1.0, input_bytes=10, attention_bytes=20, rest_bytes=1000)] * 6
    chosen = choose(
        costs, link_bytes_per_s=1e3, host_bytes=30 * slots, keep_last=0, drives=DriveRoom(room, rate), gpu_bytes=0
    )
    assert chosen[0] == Choice(mode) and chosen[-1].mode == ("recompute" if slots == 1 else mode)


@pytest.mark.parametrize(("rate", "mode"), [(1e12, "swap"), (1.0, "input")])
def test_auto_measures_the_drive_and_chooses(
    disk_folder: Path, rate: float, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drives, "bytes_per_s", lambda _: rate)
    expected, model, said = gradients(llama(), *batch()), llama(), []
    options = ActivationOptions(mode="auto", host_bytes=LAYERS * leaves_bytes("input") + PAGE, keep_last=0)
    swap = Activations(options, CPU, drives=Drives(folders=[disk_folder]), say=said.append, poison=True)
    swap.wrap(model.blocks())
    for step in range(5):
        assert_equal(gradients(model, *batch()), expected)
        assert swap.choices == (Choice(mode if step > 2 else "input"),) * LAYERS
    assert (swap.pools.size_bytes()["nvme"] > 0) == (mode == "swap")
    assert "drives " in said[0] and (mode == "input" or "goes on to NVMe" in said[1])
    swap.close()


def test_the_rate_of_a_drive(disk_folder: Path) -> None:
    assert 1e6 < Drives(folders=[disk_folder], most_bytes=64 << 20).bytes_per_s() < 1e12
    assert Drives(folders=[disk_folder], most_bytes=5).bytes_per_s() == 0
    alone = Drives(folders=[disk_folder]).room_bytes()
    assert Drives(folders=[disk_folder], most_bytes=5).room_bytes() == 5 < alone
    assert Drives(folders=[disk_folder], sharing=8).room_bytes() < alone / 7


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_on_a_gpu(disk_folder: Path, compiled: bool) -> None:
    gpu = torch.device("cuda")
    inputs = batch(device=gpu)
    kept: Llama = llama(torch.bfloat16, gpu, LARGE)
    model = llama(torch.bfloat16, gpu, LARGE)
    each = 2 * SEQ * (4 * 512 + 32) + PAGE
    if compiled:  # cut at products and attention a block rounds otherwise than compiled as one: to compare, swap both
        for block in (*kept.blocks(), *model.blocks()):
            block.forward = torch.compile(block.forward)
        leaving(kept, disk_folder, each=each, slots=len(kept.blocks()))
    expected = gradients(kept, *inputs)
    swap = leaving(model, disk_folder, each=each, slots=3)
    for _ in range(10):
        for a, b in zip(gradients(model, *inputs), expected, strict=True):
            assert (a - b).abs().max() <= 0.02 * b.abs().max()  # attention's backward may add in any order
    assert swap.pools.size_bytes()["nvme"] > 0
    swap.close()
