import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import offload.arena as arena_module
from offload.arena import ALIGN, PAGE, SHARED, Arena, ArenaError, check_capacity, layout
from offload.hostpool import HostPool

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def left(pid: int) -> list[str]:
    return [name for name in os.listdir(SHARED) if name.startswith(f"atoll-{pid}-")]


@pytest.fixture
def small_shared(small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shared memory of 4 MiB, with nothing in it."""
    monkeypatch.setattr(arena_module, "SHARED", small_tmpfs)
    return small_tmpfs


def taken_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def test_all_pages_are_taken_at_the_start_and_go_back(small_shared: Path, pool: HostPool) -> None:
    for threads in (pool, None):
        with Arena(3 * MIB + 1, pool=threads) as arena:
            assert arena.size_bytes == 3 * MIB + PAGE == taken_bytes(small_shared)
        assert taken_bytes(small_shared) == 0


def test_an_old_kernel_takes_all_pages_too(small_shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 9999)  # a number that no kernel knows
    with Arena(3 * MIB):
        assert taken_bytes(small_shared) == 3 * MIB


@pytest.mark.parametrize("for_drives", [False, True])
def test_a_limit_on_addresses_is_named(for_drives: bool) -> None:
    """`ulimit -v`: the machine has the memory, and the kernel does not map it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 64 * MIB, before[1]))
    try:
        with pytest.raises(ArenaError, match=r"could not map .*ulimit -v.* lower offload.host_bytes"):
            Arena(256 * MIB, for_drives=for_drives)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not left(os.getpid())


def test_nothing_is_left_however_the_process_ends() -> None:
    code = "from offload.arena import Arena; a = Arena(4 << 20); print('up', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert not left(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_what_is_asked_is_what_is_used() -> None:
    """The shards of a Llama of 1b parameters in sixteenths: DeepSpeed's pinned buffers would take up to twice that."""
    sizes = [2048 * 8192 * 3 // 16, 128_256 * 2048 // 16, 2048 * 2560 // 16, 2049, 33]
    asked = sum(2 * numel + 3 * 4 * numel for numel in sizes)
    with Arena(int(asked * 1.001)) as arena:
        for numel in sizes:
            arena.take(numel, torch.bfloat16)
            for _ in range(3):
                arena.take(numel, torch.float32)


def test_a_small_tensor_wastes_less_than_a_cache_line() -> None:
    with Arena(PAGE) as arena:
        for _ in range(PAGE // ALIGN):
            arena.take(1, torch.bfloat16)


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
        assert layout(numel, dtypes)[1] <= 1.02 * 28 * numel


def test_small_arrays_walked_together_are_packed() -> None:
    assert layout(1000, [torch.float32] * 3) == ([0, 4032, 2 * 4032], 3 * 4032)


def test_a_change_in_one_tensor_does_not_spoil_anothers_backward() -> None:
    with Arena(MIB) as arena:
        saved, other = arena.take(4, torch.float32), arena.take(4, torch.float32)
        x = torch.ones(4, requires_grad=True)
        loss = (x * saved).sum()
        other.add_(1)
        loss.backward()


def test_a_full_arena_says_how_full_it_is_and_what_to_change() -> None:
    with Arena(4 * PAGE) as arena:
        arena.take(3 * PAGE, torch.uint8)
        with pytest.raises(
            ArenaError,
            match=rf"{2 * PAGE} bytes asked for, {PAGE} of {4 * PAGE} are free.*offload\.host_bytes \(now {4 * PAGE}\)",
        ):
            arena.take(2 * PAGE, torch.uint8)


def test_more_than_the_machine_has_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ArenaError, match=r"offload\.host_bytes=\d+: /dev/shm has \d+ bytes free of \d+.*--shm-size"):
        Arena(1 << 46)
    assert not left(os.getpid())


def test_more_than_the_container_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "host_available_bytes", lambda: MIB)
    with pytest.raises(ArenaError, match=rf"has {MIB} bytes of memory available; lower offload\.host_bytes"):
        check_capacity(MIB + PAGE)
    check_capacity(MIB)


def test_memory_that_another_takes_meanwhile_is_an_error_not_a_dead_process(
    small_shared: Path, pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "check_capacity", lambda *_: None)  # it looked before the other took
    for threads in (pool, None):
        with pytest.raises(ArenaError, match=r"could not take 8388608 bytes.*Lower offload\.host_bytes"):
            Arena(8 * MIB, pool=threads)
        assert taken_bytes(small_shared) == 0, "the failed arena keeps its memory"


def test_a_small_shared_memory_is_named_with_its_size(small_shared: Path) -> None:
    with pytest.raises(ArenaError, match=re.escape(f"{small_shared} has {4 * MIB} bytes free of {4 * MIB}")):
        Arena(5 * MIB)


def test_shared_memory_on_a_disk_is_refused(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "SHARED", disk_folder)
    with pytest.raises(ValueError, match=r"only a tmpfs is memory; mount one there"):
        Arena(PAGE)


def test_memory_for_drives_is_this_process_alone(small_shared: Path, pool: HostPool) -> None:
    with Arena(8 * MIB, pool=pool, for_drives=True) as arena:
        tensor = arena.take(4 * MIB, torch.uint8, align=PAGE)
        assert not tensor.any() and taken_bytes(small_shared) == 0
        lines = Path("/proc/self/smaps").read_text().split("\n")
        first = next(i for i, line in enumerate(lines) if line.startswith(f"{tensor.data_ptr():x}-"))
        rows = [line.split(":", 1) for line in lines[first + 1 :] if ":" in line]
        held = dict(reversed(rows))  # of rows of one name the first, which is this mapping's
        assert held["Rss"].split()[0] == str(8 * MIB // 1024), "pages are taken at the start"
        assert {"dc", "hg"} <= set(held["VmFlags"].split()), "not for a fork's child, in huge pages"


def test_memory_for_drives_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "host_available_bytes", lambda: MIB)
    with pytest.raises(ArenaError, match=rf"has {MIB} bytes of memory available; lower offload\.host_bytes"):
        Arena(MIB + PAGE, for_drives=True)


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
def test_a_registration_that_cuda_refuses_says_what_to_do() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with Arena(MIB, register=device) as arena:
        with pytest.raises(
            ArenaError, match=r"cudaHostRegister of \d+ bytes: CUDA error .*memlock.*offload\.host_bytes"
        ):
            arena_module._register(arena._memory, device)  # twice the same pages
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)  # CUDA tells its last error once more, at the next kernel
