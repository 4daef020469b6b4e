"""What every tier must do. A test file parametrizes over CHECKS and gives each a fresh tier of SIZE bytes."""

import mmap
import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offload.tier import Tier

PAGE = 4096
SIZE = 256 * PAGE
CHECKS: list[Callable[[Tier], None]] = []


def check(function: Callable[[Tier], None]) -> Callable[[Tier], None]:
    CHECKS.append(function)
    return function


def pages(count: int, fill: int | None = None) -> Tensor:
    """Page-aligned uint8, each byte `fill`, or random."""
    tensor = torch.frombuffer(mmap.mmap(-1, count * PAGE), dtype=torch.uint8)
    return tensor.random_(0, 256) if fill is None else tensor.fill_(fill)


@check
def what_is_stored_is_loaded(tier: Tier) -> None:
    stored, loaded = pages(256), pages(256, 0)
    assert tier.store(0, stored).result(60) is stored
    assert tier.load(0, loaded).result(60) is loaded
    assert torch.equal(stored, loaded)


@check
def what_was_never_stored_is_zero(tier: Tier) -> None:
    loaded = pages(256, 7)
    tier.load(0, loaded).result(60)
    assert not loaded.any()


@check
def any_dtype_and_shape_is_kept(tier: Tier) -> None:
    stored = pages(4).view(torch.bfloat16).view(4, -1)
    loaded = pages(4, 0).view(torch.bfloat16).view(4, -1)
    tier.store(3 * PAGE, stored)
    tier.load(3 * PAGE, loaded).result(60)
    assert torch.equal(stored.view(torch.int16), loaded.view(torch.int16))


@check
def a_store_touches_its_range_alone(tier: Tier) -> None:
    tier.store(0, pages(256, 1)).result(60)
    tier.store(100 * PAGE, pages(3, 2)).result(60)
    loaded = pages(256, 0)
    tier.load(0, loaded).result(60)
    expected = pages(256, 1)
    expected[100 * PAGE : 103 * PAGE] = 2
    assert torch.equal(loaded, expected)


@check
def a_load_sees_the_last_store_before_it(tier: Tier) -> None:
    stored = [pages(64, i) for i in range(1, 20)]
    loaded = [pages(64, 0) for _ in stored]
    answers = []
    for values, into in zip(stored, loaded, strict=True):
        answers += [tier.store(5 * PAGE, values), tier.load(5 * PAGE, into)]
    for answer in answers:
        answer.result(60)
    assert all(torch.equal(a, b) for a, b in zip(stored, loaded, strict=True))


@check
def random_requests_end_as_if_made_one_by_one(tier: Tier) -> None:
    dice = random.Random(3)
    model, expected, answers = pages(256, 0), [], []
    for number in range(300):
        count = dice.randint(1, 40)
        start = dice.randint(0, 256 - count) * PAGE
        if dice.random() < 0.5:
            values = pages(count, number % 251)
            answers.append(tier.store(start, values))
            model[start : start + values.nbytes] = values
        else:
            into = pages(count, 255)
            answers.append(tier.load(start, into))
            expected.append((into, model[start : start + into.nbytes].clone()))
    tier.flush()
    assert all(answer.done() for answer in answers), "flush left some unanswered"
    assert all(torch.equal(into, values) for into, values in expected)


@check
def requests_of_many_threads_are_all_answered(tier: Tier) -> None:
    wrong: list[int] = []

    def work(place: int) -> None:
        for turn in range(20):
            values, into = pages(16, place * 20 + turn), pages(16, 0)
            tier.store(place * 16 * PAGE, values)
            tier.load(place * 16 * PAGE, into).result(60)
            if not torch.equal(values, into):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@check
def a_range_outside_is_refused(tier: Tier) -> None:
    for offset, count in ((-PAGE, 1), (SIZE, 1), (SIZE - PAGE, 2), (0, 257)):
        for act in (tier.store, tier.load):
            with pytest.raises(ValueError, match=f"must be some of the tier's 0 to {SIZE}"):
                act(offset, pages(count))
    with pytest.raises(ValueError, match="must be some of"):
        tier.load(0, torch.empty(0))


@check
def tensors_that_cannot_be_moved_are_refused(tier: Tier) -> None:
    for tensor in (pages(4).view(4, -1).t(), torch.empty(PAGE, dtype=torch.uint8, device="meta")):
        with pytest.raises(ValueError, match="contiguous and on the CPU"):
            tier.store(0, tensor)


@check
def an_unaligned_request_is_refused(tier: Tier) -> None:
    shifted = pages(3)[tier.align // 2 :][:PAGE]
    for offset, tensor in ((tier.align // 2, pages(1)), (0, pages(1)[:100]), (0, shifted)):
        with pytest.raises(ValueError, match=f"multiple of {tier.align}; take the tensor from an Arena"):
            tier.load(offset, tensor)


@check
def a_closed_tier_refuses(tier: Tier) -> None:
    answer = tier.store(0, pages(256))
    tier.close()
    assert answer.done()
    tier.close()
    for act in (lambda: tier.store(0, pages(1)), lambda: tier.load(0, pages(1)), tier.flush):
        with pytest.raises(ValueError, match="closed"):
            act()
