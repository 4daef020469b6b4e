"""Every call that NvmeTier makes of the operating system fails here, for real where this machine can make it fail."""

import errno
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.drive import DriveError, SystemCalls
from offload.nvme import NvmeTier
from tests.offload.tier_conformance import PAGE, pages

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


class Fault:
    """Makes a system call fail once it is armed; until then, and after `times` failures, it does its work."""

    def __init__(self, call: Callable[..., Any], failure: Callable[..., Any], times: int = 10**9) -> None:
        self.call, self.failure, self.times, self.armed = call, failure, times, False
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        with self._lock:
            fails = self.armed and self.times > 0
            self.times -= fails
        return (self.failure if fails else self.call)(*arguments)


def raising(number: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def first_bytes(call: Callable[..., int], count: int) -> Callable[..., int]:
    """The call does `count` bytes of what it was asked."""
    return lambda handle, buffers, offset: call(handle, [buffers[0][:count]], offset)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENODEV, errno.EROFS, errno.ESTALE])
def test_a_failed_store_names_file_offset_and_remedy_and_stops_the_tier(disk_folder: Path, number: int) -> None:
    fault = Fault(os.pwritev, raising(number), times=1)
    tier = NvmeTier([disk_folder], 64 * PAGE, calls=SystemCalls(pwritev=fault))
    fault.armed = True
    answer = tier.store(3 * PAGE, pages(2))
    with pytest.raises(DriveError) as raised:
        answer.result(60)
    assert raised.value.errno == number
    text = str(raised.value)
    assert f"write of {2 * PAGE} bytes at offset {3 * PAGE}: {os.strerror(number)}; " in text
    assert str(disk_folder) in text and ("offload.nvme_path" in text)
    # the fault is over, but nobody knows what is on the drive
    for act in (lambda: tier.store(0, pages(1)), lambda: tier.load(32 * PAGE, pages(1)), tier.flush, tier.close):
        with pytest.raises(DriveError, match="a store to this tier failed before: .*at offset"):
            act()


def test_a_failed_load_raises_and_spoils_nothing(disk_folder: Path) -> None:
    fault = Fault(os.preadv, raising(errno.EIO), times=1)
    with NvmeTier([disk_folder], 64 * PAGE, calls=SystemCalls(preadv=fault)) as tier:
        stored, loaded = pages(4), pages(4, 0)
        tier.store(8 * PAGE, stored).result(60)
        fault.armed = True
        with pytest.raises(DriveError, match=rf"read of {4 * PAGE} bytes at offset {8 * PAGE}.*dmesg.*last checkpoint"):
            tier.load(8 * PAGE, loaded).result(60)
        tier.load(8 * PAGE, loaded).result(60)
        assert torch.equal(stored, loaded)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_waits_for_a_failed_store_fails_with_it(disk_folder: Path, number: int) -> None:
    go = threading.Event()

    def fail_late(*_: Any) -> int:
        go.wait(60)
        raise OSError(number, "")

    fault = Fault(os.pwritev, fail_late)
    tier = NvmeTier([disk_folder], 64 * PAGE, calls=SystemCalls(pwritev=fault))
    fault.armed = True
    into = pages(8, 9)
    answers = [tier.store(0, pages(8)), tier.load(PAGE, into), tier.store(4 * PAGE, pages(8))]
    answers.append(tier.load(8 * PAGE, pages(2)))  # waits for the second store, which waits for the first
    go.set()
    for answer in answers:
        with pytest.raises(DriveError) as raised:
            answer.result(60)
        assert raised.value.errno == number
    assert (into == 9).all(), "old bytes were handed out as new"
    with pytest.raises(DriveError):
        tier.close()


def test_a_store_whose_answer_nobody_reads_is_raised_by_flush(disk_folder: Path) -> None:
    fault = Fault(os.pwritev, raising(errno.ENOSPC))
    tier = NvmeTier([disk_folder], 8 * PAGE, calls=SystemCalls(pwritev=fault))
    fault.armed = True
    tier.store(0, pages(8))
    with pytest.raises(DriveError, match="No space left"):
        tier.flush()
    with pytest.raises(DriveError):
        tier.close()


def test_one_bad_drive_of_three_is_named(disk_folder: Path) -> None:
    folders = [disk_folder / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    handles: dict[int, str] = {}

    def opened(file: Path, *rest: int) -> int:
        handle = os.open(file, *rest)
        handles[handle] = file.parent.name
        return handle

    def write(handle: int, buffers: list[memoryview], offset: int) -> int:
        if handles[handle] == "b" and offset:
            raise OSError(errno.EIO, "")
        return os.pwritev(handle, buffers, offset)

    tier = NvmeTier(folders, 12 * PAGE, stripe_bytes=PAGE, calls=SystemCalls(open=opened, pwritev=write))
    with pytest.raises(DriveError, match=re.escape(f"{folders[1]}/")):
        tier.store(0, pages(12)).result(60)
    with pytest.raises(DriveError):
        tier.close()


@pytest.mark.parametrize("act", ["preadv", "pwritev"])
def test_a_short_transfer_is_continued(disk_folder: Path, act: str) -> None:
    call = getattr(os, act)
    fault = Fault(call, first_bytes(call, PAGE))
    with NvmeTier([disk_folder], 64 * PAGE, calls=SystemCalls(**{act: fault})) as tier:
        fault.armed = True
        stored, loaded = pages(7), pages(7, 0)
        tier.store(PAGE, stored)
        tier.load(PAGE, loaded).result(60)
        assert torch.equal(stored, loaded)
        assert fault.times == 10**9 - 7


@pytest.mark.parametrize("count", [0, 100, 512])
@pytest.mark.parametrize("act", ["preadv", "pwritev"])
def test_a_transfer_that_stops_is_an_error(disk_folder: Path, act: str, count: int) -> None:
    fault = Fault(getattr(os, act), lambda *_: count)
    tier = NvmeTier([disk_folder], 64 * PAGE, calls=SystemCalls(**{act: fault}))
    fault.armed = True
    answer = (tier.load if act == "preadv" else tier.store)(0, pages(2))
    with pytest.raises(DriveError, match=rf"bytes at offset 0 ended after {count} bytes"):
        answer.result(60)
    fault.armed = False
    if act == "preadv":
        tier.close()
    else:
        with pytest.raises(DriveError):
            tier.close()


def test_a_file_cut_short_by_another_is_an_error(disk_folder: Path) -> None:
    with NvmeTier([disk_folder], 64 * PAGE) as tier:
        tier.store(0, pages(64)).result(60)
        os.ftruncate(tier._drives[0]._handle, 10 * PAGE)
        tier.load(0, pages(10)).result(60)
        with pytest.raises(DriveError, match=rf"read of {10 * PAGE} bytes at offset {10 * PAGE} ended after 0 bytes"):
            tier.load(0, pages(20)).result(60)


def test_a_drive_that_is_full_at_a_write(disk_folder: Path) -> None:
    """/dev/full answers every write as a drive without space does."""
    tier = NvmeTier([disk_folder], 8 * PAGE)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, tier._drives[0]._handle)
    os.close(full)
    with pytest.raises(DriveError, match="No space left.*lower offload.nvme_bytes"):
        tier.store(0, pages(8)).result(60)
    with pytest.raises(DriveError):
        tier.close()


def test_a_handle_that_is_lost(disk_folder: Path) -> None:
    tier = NvmeTier([disk_folder], 8 * PAGE)
    read_only = os.open("/dev/null", os.O_RDONLY)
    os.dup2(read_only, tier._drives[0]._handle)
    os.close(read_only)
    with pytest.raises(DriveError, match="Bad file descriptor.*the drive is gone"):
        tier.store(0, pages(8)).result(60)
    with pytest.raises(DriveError):
        tier.close()


@pytest.fixture
def dying_drive(disk_folder: Path) -> Iterator[tuple[Path, Path]]:
    """A mounted ext4 on a loop device, and the file that backs it: cut that, and the drive fails with EIO."""
    image, folder = disk_folder / "image", disk_folder / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    made = subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], capture_output=True)
    if made.returncode or subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip("may not mount a loop device")
    yield folder, image
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_drive_that_dies_is_an_io_error(dying_drive: tuple[Path, Path]) -> None:
    folder, image = dying_drive
    tier = NvmeTier([folder], 8 * MIB)
    tier.store(0, pages(2048)).result(60)
    os.truncate(image, 64 * 1024)
    with pytest.raises(DriveError, match="Input/output error.*dmesg.*last checkpoint"):
        tier.load(0, pages(2048)).result(60)
    tier.close()


def test_a_drive_that_is_too_small_is_refused_at_the_start(dying_drive: tuple[Path, Path]) -> None:
    folder, _ = dying_drive
    with pytest.raises(DriveError, match=r"creation of a file of 41943040 bytes \(\d+ are free\): No space left"):
        NvmeTier([folder], 40 * MIB)
    assert [entry.name for entry in folder.iterdir()] == ["lost+found"]


def test_memory_in_the_guise_of_a_drive_is_refused(small_tmpfs: Path) -> None:
    with pytest.raises(ValueError, match=r"tmpfs is memory, not a drive.*offload\.nvme_direct=false"):
        NvmeTier([small_tmpfs], PAGE)
    NvmeTier([small_tmpfs], PAGE, direct=False).close()
    with pytest.raises(DriveError, match="4194304 are free.*No space left"):
        NvmeTier([small_tmpfs], 5 * MIB, direct=False)


def test_a_limit_on_the_size_of_files_is_named(disk_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from offload.nvme import NvmeTier\n"
        "try: NvmeTier([Path(sys.argv[1])], 4 << 20)\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, disk_folder], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)),
    )  # fmt: skip
    assert "File too large" in done.stdout and "ulimit -f" in done.stdout
    assert not list(disk_folder.iterdir())


def test_a_folder_that_is_not_there_is_named(disk_folder: Path) -> None:
    with pytest.raises(DriveError, match=r"no such folder.*offload\.nvme_path.*absent"):
        NvmeTier([disk_folder / "absent"], PAGE)


@pytest.mark.parametrize("name", ["open", "fallocate", "preadv", "pwritev"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.EACCES])
def test_a_start_that_fails_leaves_nothing(disk_folder: Path, name: str, number: int) -> None:
    call = {"open": os.open, "fallocate": os.posix_fallocate, "preadv": os.preadv, "pwritev": os.pwritev}[name]
    fault = Fault(call, raising(number))
    fault.armed = True
    handles, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    with pytest.raises(DriveError) as raised:
        NvmeTier([disk_folder], PAGE, calls=SystemCalls(**{name: fault}))
    assert raised.value.errno == number and "offload.nvme_" in str(raised.value)
    assert not list(disk_folder.iterdir())
    assert set(os.listdir("/proc/self/fd")) == handles and threading.active_count() == threads


def test_a_second_drive_that_fails_at_the_start_closes_the_first(disk_folder: Path) -> None:
    handles, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    with pytest.raises(DriveError, match="absent"):
        NvmeTier([disk_folder, disk_folder / "absent"], PAGE)
    assert set(os.listdir("/proc/self/fd")) == handles and threading.active_count() == threads


def test_a_file_system_without_direct_io_is_refused_at_the_start(disk_folder: Path) -> None:
    def refuse(file: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "")
        return os.open(file, flags, *mode)

    with pytest.raises(DriveError, match=r"opening for direct I/O: Invalid argument.*offload\.nvme_direct=false"):
        NvmeTier([disk_folder], PAGE, calls=SystemCalls(open=refuse))
    NvmeTier([disk_folder], PAGE, direct=False, calls=SystemCalls(open=refuse)).close()
