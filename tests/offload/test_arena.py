import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offload.arena as arena_module
from offload.arena import ALIGN, PAGE, SHARED, Arena, ArenaError, Region, check_capacity
from offload.hostpool import HostPool
from offload.space import Space, SpaceError

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def named() -> Iterator[Path]:
    """A path for an arena, which this test owns."""
    path = SHARED / f"atoll-test-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


def left() -> set[str]:
    return {name for name in os.listdir(SHARED) if name.startswith("atoll-")}


def resident_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_all_pages_are_taken_at_the_start(named: Path, pool: HostPool) -> None:
    for threads in (pool, None):
        with Arena(20 * MIB + 1, path=named, pool=threads) as arena:
            assert arena.size_bytes == 20 * MIB + PAGE == named.stat().st_size
            assert resident_bytes(named) >= arena.size_bytes
        named.unlink()


def test_an_old_kernel_takes_all_pages_too(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 9999)  # a number that no kernel knows
    with Arena(5 * MIB, path=named):
        assert resident_bytes(named) == 5 * MIB


def test_the_file_is_this_users_alone_and_never_anothers(named: Path) -> None:
    with Arena(PAGE, path=named):
        assert named.stat().st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError):
            Arena(PAGE, path=named)
        assert named.exists(), "the file of another arena was removed"


def test_without_a_path_nothing_is_left_however_the_process_ends() -> None:
    before = left()
    code = "from offload.arena import Arena; a = Arena(4 << 20); print('up', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert left() == before
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_named_arena_outlives_its_process_and_others_map_it(named: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from offload.arena import Arena\n"
        "a = Arena(1 << 20, path=Path(sys.argv[1])); a.take(100, torch.uint8)\n"
        "t = a.take(1000, torch.bfloat16); t.fill_(3); print(a.region_of(t).offset, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, named], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Arena.open(named) as arena:
        region = Region(offset=int(done.stdout), numel=1000, dtype=torch.bfloat16)
        assert torch.equal(arena.view(region), torch.full((1000,), 3, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="made by another process"):
            arena.take(1, torch.uint8)
    assert named.exists()


def test_two_mappings_are_the_same_memory(named: Path) -> None:
    with Arena(MIB, path=named) as arena, Arena.open(named) as other:
        tensor = arena.take(500, torch.float32)
        seen = other.view(arena.region_of(tensor))
        tensor.fill_(2.5)
        assert torch.equal(seen, tensor) and seen.data_ptr() != tensor.data_ptr()


def test_what_is_asked_is_what_is_used() -> None:
    """The shards of a Llama of 1b parameters in sixteenths: DeepSpeed's pinned buffers would take up to twice that."""
    sizes = [2048 * 8192 * 3 // 16, 128_256 * 2048 // 16, 2048 * 2560 // 16, 2049, 33]
    asked = sum(2 * numel + 3 * 4 * numel for numel in sizes)
    with Arena(int(asked * 1.05)) as arena:
        for numel in sizes:
            arena.take(numel, torch.bfloat16)
            for _ in range(3):
                arena.take(numel, torch.float32)
        assert asked <= arena.used_bytes <= 1.001 * asked


def test_a_small_tensor_wastes_less_than_a_cache_line() -> None:
    with Arena(MIB) as arena:
        arena.take(1, torch.bfloat16)
        assert arena.used_bytes == ALIGN


def test_tensors_are_apart_aligned_and_zero_at_first() -> None:
    with Arena(MIB) as arena:
        tensors = [arena.take(n, torch.float32) for n in (1, 17, 1000)] + [arena.take(5, torch.uint8, align=PAGE)]
        assert all(not tensor.any() and tensor.data_ptr() % ALIGN == 0 for tensor in tensors)
        assert tensors[-1].data_ptr() % PAGE == 0
        for i, tensor in enumerate(tensors):
            tensor.fill_(i)
        assert all((tensor == i).all() for i, tensor in enumerate(tensors))


def test_arrays_walked_side_by_side_share_no_low_address_bits() -> None:
    dtypes = [torch.float32] * 6 + [torch.bfloat16] * 2
    numel = 1 << 20
    with Arena(40 * MIB) as arena:
        tensors = arena.take_together(numel, dtypes, align=PAGE)
        assert tensors[0].data_ptr() % PAGE == 0
        assert all(
            tensor.data_ptr() % ALIGN == 0 and tensor.dtype == d for tensor, d in zip(tensors, dtypes, strict=True)
        )
        low = [tensor.data_ptr() % PAGE for tensor in tensors]
        assert all(abs(a - b) % PAGE >= 256 for i, a in enumerate(low) for b in low[:i])
        for i, tensor in enumerate(tensors):
            tensor.fill_(i)
        assert all((tensor == i).all() for i, tensor in enumerate(tensors))
        assert arena.used_bytes <= 1.02 * 28 * numel
        arena.give(tensors[0])
        assert arena.used_bytes == 0


def test_small_arrays_walked_together_are_packed() -> None:
    with Arena(MIB) as arena:
        arena.take_together(1000, [torch.float32] * 3)
        assert arena.used_bytes == 3 * 4032


def test_a_change_in_one_tensor_does_not_spoil_anothers_backward() -> None:
    with Arena(MIB) as arena:
        saved, other = arena.take(4, torch.float32), arena.take(4, torch.float32)
        x = torch.ones(4, requires_grad=True)
        loss = (x * saved).sum()
        other.add_(1)
        loss.backward()


def test_what_is_given_back_is_taken_again() -> None:
    with Arena(4 * PAGE) as arena:
        first, second = arena.take(2 * PAGE, torch.uint8), arena.take(2 * PAGE, torch.uint8)
        address = first.data_ptr()
        arena.give(first[:10])
        assert arena.take(2 * PAGE, torch.uint8).data_ptr() == address
        with pytest.raises(ValueError, match="given back twice"):
            arena.give(second[1:])
        with pytest.raises(ValueError, match="not of this arena"):
            arena.give(torch.ones(3))


def test_a_full_arena_says_how_full_it_is_and_what_to_change() -> None:
    with Arena(4 * PAGE) as arena:
        arena.take(3 * PAGE, torch.uint8)
        with pytest.raises(
            ArenaError,
            match=rf"{2 * PAGE} bytes asked for, {PAGE} of {4 * PAGE} are free.*offload\.host_bytes \(now {4 * PAGE}\)",
        ):
            arena.take(2 * PAGE, torch.uint8)


def test_more_than_the_machine_has_is_refused_before_it_is_taken() -> None:
    before = left()
    with pytest.raises(ArenaError, match=r"offload\.host_bytes=\d+: /dev/shm has \d+ bytes free of \d+.*--shm-size"):
        Arena(1 << 46)
    assert left() == before


def test_more_than_the_container_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "host_available_bytes", lambda: MIB)
    with pytest.raises(ArenaError, match=rf"has {MIB} bytes of memory available; lower offload\.host_bytes"):
        check_capacity(MIB + PAGE)
    check_capacity(MIB)


def test_memory_that_another_takes_meanwhile_is_an_error_not_a_dead_process(
    small_tmpfs: Path, pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "check_capacity", lambda *_: None)  # it looked before the other took
    for threads in (pool, None):
        with pytest.raises(ArenaError, match=r"could not take 8388608 bytes.*Lower offload\.host_bytes"):
            Arena(8 * MIB, path=small_tmpfs / "slab", pool=threads)
        assert not list(small_tmpfs.iterdir()), "the failed arena keeps its memory"


def test_a_small_shared_memory_is_named_with_its_size(small_tmpfs: Path) -> None:
    with pytest.raises(ArenaError, match=re.escape(f"{small_tmpfs} has {4 * MIB} bytes free of {4 * MIB}")):
        Arena(5 * MIB, path=small_tmpfs / "slab")


def test_a_path_on_a_disk_is_refused(disk_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"only a tmpfs is memory; use a path in /dev/shm"):
        Arena(PAGE, path=disk_folder / "slab")


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"offload\.host_bytes=0: at least 1"):
        Arena(0)
    with Arena(PAGE) as arena, pytest.raises(ValueError, match="align=96"):
        arena.take(1, torch.uint8, align=96)


def test_a_tensor_outlives_its_arena_and_the_arena_gives_no_more() -> None:
    arena = Arena(PAGE)
    tensor = arena.take(10, torch.float32)
    arena.close()
    arena.close()
    tensor.fill_(1)  # would be a segmentation fault
    assert tensor.sum() == 10
    with pytest.raises(ValueError, match="closed"):
        arena.take(1, torch.uint8)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000), st.sampled_from([64, 128, 4096])), max_size=60))
def test_space_never_gives_a_byte_twice_and_loses_none(acts: list[tuple[bool, int, int]]) -> None:
    space, taken = Space(16 * 4096, align=64), dict[int, int]()
    for take, number, align in acts:
        if take:
            try:
                start = space.take(number, align)
            except SpaceError:
                assert space.largest_free_bytes < number + align
                continue
            assert start % align == 0 and start + number <= space.size_bytes
            assert all(start + number <= other or other + size <= start for other, size in taken.items())
            taken[start] = number
        elif taken:
            start = sorted(taken)[number % len(taken)]
            space.give(start)
            del taken[start]
    for start in taken:
        space.give(start)
    assert space.taken_bytes == 0 and space.largest_free_bytes == space.size_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_registered_arena_copies_to_the_gpu_asynchronously() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with Arena(256 * MIB, register=device) as arena:
        tensor = arena.take(32 * MIB, torch.float32)
        assert tensor.is_pinned()
        on_gpu = torch.ones(32 * MIB, device=device)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        tensor.copy_(on_gpu, non_blocking=True)
        assert not tensor.any(), "the copy waited for the GPU"
        torch.cuda.synchronize()
        assert tensor.all()
    assert not torch.ones(1).is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_arena_of_another_process_is_registered_too(named: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with Arena(MIB, path=named) as arena:
        region = arena.region_of(arena.take(1000, torch.float32).fill_(4))
        with Arena.open(named, register=device) as other:
            assert other.view(region).is_pinned()
            assert other.view(region).to(device, non_blocking=True).sum().item() == 4000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_registration_that_cuda_refuses_says_what_to_do(named: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with Arena(MIB, path=named, register=device) as arena:
        with pytest.raises(
            ArenaError, match=r"cudaHostRegister of \d+ bytes: CUDA error .*memlock.*offload\.host_bytes"
        ):
            arena_module._register(arena._memory, device)  # twice the same pages
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)  # CUDA tells its last error once more, at the next kernel
