import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload.arena import Arena
from offload.drive import SystemCalls
from offload.nvme import NvmeTier, endurance
from offload.tier import Tier
from tests.offload.tier_conformance import CHECKS, PAGE, SIZE, pages


@pytest.fixture(params=["one drive", "three drives", "through the page cache"])
def tier(request: pytest.FixtureRequest, disk_folder: Path) -> Iterator[NvmeTier]:
    folders = [disk_folder / str(i) for i in range(3 if request.param == "three drives" else 1)]
    for folder in folders:
        folder.mkdir()
    # stripes of 3 pages: most requests touch several drives, in part
    with NvmeTier(folders, SIZE, stripe_bytes=3 * PAGE, depth=3, direct="cache" not in request.param) as made:
        yield made


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nvme_is_a_tier(check: Callable[[Tier], None], tier: NvmeTier) -> None:
    check(tier)


def test_a_tier_of_odd_size_on_many_drives_holds_all_its_bytes(disk_folder: Path) -> None:
    with NvmeTier([disk_folder] * 3, 7 * PAGE + 1, stripe_bytes=2 * PAGE) as tier:
        assert tier.size_bytes == 8 * PAGE
        stored, loaded = pages(8), pages(8, 0)
        tier.store(0, stored)
        tier.load(0, loaded).result(60)
        assert torch.equal(stored, loaded)


def test_stripes_go_to_the_drives_in_turn(disk_folder: Path) -> None:
    with NvmeTier([disk_folder] * 2, 6 * PAGE, stripe_bytes=PAGE) as tier:
        stored, one = pages(6), pages(1)
        tier.store(0, stored).result(60)
        for stripe in range(6):
            tier._drives[stripe % 2].read(one.numpy().data, stripe // 2 * PAGE)
            assert torch.equal(one, stored[stripe * PAGE : (stripe + 1) * PAGE])


def test_direct_io_leaves_the_page_cache_alone(disk_folder: Path) -> None:
    """The kernel's own count of pages of the file that are cached."""
    with NvmeTier([disk_folder], 8 << 20) as tier:
        values = pages(2048)
        tier.store(0, values).result(60)
        tier.load(0, values).result(60)
        assert cached_pages(tier._drives[0]._handle) == 0
    with NvmeTier([disk_folder], 8 << 20, direct=False) as tier:
        tier.store(0, values).result(60)
        assert cached_pages(tier._drives[0]._handle) == 2048, "the count does not count"


def cached_pages(handle: int) -> int:
    import ctypes
    import mmap

    size = os.fstat(handle).st_size
    memory = mmap.mmap(handle, size)
    here = (ctypes.c_ubyte * (size // PAGE))()
    address = ctypes.c_void_p(torch.frombuffer(memory, dtype=torch.uint8).data_ptr())
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), here) == 0
    return sum(byte & 1 for byte in here)


def test_going_through_the_page_cache_is_said(disk_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    NvmeTier([disk_folder], PAGE, direct=False).close()
    assert "offload.nvme_direct=false: state goes through the page cache" in caplog.text


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_has_no_name_when_its_space_is_taken(disk_folder: Path, direct: bool) -> None:
    """Or what kills the process then, which may be long, leaves all of it on the drive."""
    seen: list[list[str]] = []

    def fallocate(handle: int, offset: int, size_bytes: int) -> None:
        seen.append(os.listdir(disk_folder))
        os.posix_fallocate(handle, offset, size_bytes)

    NvmeTier([disk_folder], 3 << 20, direct=direct, calls=SystemCalls(fallocate=fallocate)).close()
    assert seen == [[]]


def test_its_space_is_taken_at_the_start_and_given_back(disk_folder: Path) -> None:
    with NvmeTier([disk_folder], 3 << 20) as tier:
        assert os.fstat(tier._drives[0]._handle).st_blocks * 512 >= 3 << 20
        assert os.fstat(tier._drives[0]._handle).st_mode & 0o777 == 0o600
        assert os.fstat(tier._drives[0]._handle).st_nlink == 0, "a killed process would leave the file"
    assert not list(disk_folder.iterdir())


def test_slices_of_an_arena_are_stored_and_loaded(disk_folder: Path) -> None:
    with Arena(64 * PAGE) as arena, NvmeTier([disk_folder], 64 * PAGE) as tier:
        arena.take(5, torch.uint8)
        stored, loaded = (arena.take(8 * 1024, torch.float32, align=PAGE) for _ in range(2))
        stored.uniform_()
        tier.store(PAGE, stored)
        tier.load(PAGE, loaded).result(60)
        assert torch.equal(stored, loaded)


def test_requests_apart_do_not_wait_for_each_other(disk_folder: Path) -> None:
    hold = threading.Event()

    def slow(handle: int, buffers: list[memoryview], offset: int) -> int:
        assert offset or len(buffers[0]) == PAGE or hold.wait(60)
        return os.pwritev(handle, buffers, offset)

    with NvmeTier([disk_folder], 64 * PAGE, calls=SystemCalls(pwritev=slow)) as tier:
        first = tier.store(0, pages(2))
        tier.store(32 * PAGE, pages(2)).result(60)
        beside = tier.load(32 * PAGE, pages(2))
        behind = tier.load(PAGE, pages(1))
        beside.result(60)
        assert not first.done() and not behind.done()
        hold.set()
        behind.result(60)


def test_two_loads_of_a_range_run_side_by_side(disk_folder: Path) -> None:
    both = threading.Barrier(2, timeout=60)

    def meet(handle: int, buffers: list[memoryview], offset: int) -> int:
        if offset:
            both.wait()
        return os.preadv(handle, buffers, offset)

    with NvmeTier([disk_folder], 4 * PAGE, calls=SystemCalls(preadv=meet)) as tier:
        for answer in [tier.load(PAGE, pages(1)) for _ in range(2)]:
            answer.result(60)


def test_every_drive_has_depth_requests_under_way(disk_folder: Path) -> None:
    all_in = threading.Barrier(8, timeout=60)

    def meet(handle: int, buffers: list[memoryview], offset: int) -> int:
        if len(buffers[0]) > PAGE:
            all_in.wait()  # breaks, and the store with it, unless 2 drives x 4 are in at once
        return os.pwritev(handle, buffers, offset)

    with NvmeTier(
        [disk_folder] * 2, 32 * PAGE, stripe_bytes=2 * PAGE, depth=4, calls=SystemCalls(pwritev=meet)
    ) as tier:
        tier.store(0, pages(32)).result(60)


def test_bytes_are_counted(disk_folder: Path) -> None:
    with NvmeTier([disk_folder], 64 * PAGE) as tier:
        tier.store(0, pages(10))
        tier.load(PAGE, pages(3))
        tier.flush()
        assert (tier.bytes_written, tier.bytes_read) == (10 * PAGE, 3 * PAGE)


def test_endurance_in_words() -> None:
    by_capacity = endurance(1e12, 8640, capacity_bytes=4e12)
    assert by_capacity.bytes_per_day == 1e13 and by_capacity.years == 2.0
    assert str(by_capacity) == (
        "writes 10.00 TB a day, 2.50 times the capacity; drives rated for 1 a day over 5 years last 2.0 years"
    )
    assert str(endurance(1e12, 8640, tbw=600)) == "writes 10.00 TB a day; drives rated for 600 TB last 60.0 days"
    assert "over 100 years" in str(endurance(0, 1, tbw=1)) and "offload.nvme_tbw" in str(endurance(1e12, 1))


@pytest.mark.parametrize("bad", [{"size_bytes": 0}, {"folders": []}, {"depth": 0}, {"stripe_bytes": 100}])
def test_bad_settings_are_refused(disk_folder: Path, bad: dict[str, object]) -> None:
    settings = {"folders": [disk_folder], "size_bytes": PAGE, **bad}
    with pytest.raises(ValueError, match=r"offload\.nvme_bytes="):
        NvmeTier(**settings)
    assert not list(disk_folder.iterdir())
