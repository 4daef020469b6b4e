"""Segments: what was committed is there whatever was killed; what was not, is not; and no one else gets in."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoint.snapshots import segment_files
from checkpoint.snapshots.segment import PAGE_BYTES, STRIDE_BYTES, Segment
from checkpoint.snapshots.segment_files import SegmentError, remove_leftovers

_RUN = bytes(range(16))
_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder of its own in /dev/shm: the real file system, and no other test's or job's segments."""
    path = Path("/dev/shm", f"atoll-test-{os.getpid()}-{time.monotonic_ns()}")
    path.mkdir(mode=0o700)
    yield str(path)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def make(folder: str) -> Callable[..., Segment]:
    def create(label: str = "r0", num_slots: int = 3, payload_bytes: int = 8192, run: bytes = _RUN) -> Segment:
        return Segment.create(
            run, label, num_slots=num_slots, payload_bytes=payload_bytes, meta_bytes=100, folder=folder
        )

    return create


def _write(segment: Segment, version: int, keep: tuple[int, ...] = ()) -> None:
    draft = segment.begin(version, 100 + version, keep)
    draft.payload[:] = version
    draft.commit(b"meta%d" % version)


def _versions(segment: Segment) -> list[int]:
    return [version.version for version in segment.committed()]


def _run(program: str, *arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], env=environment, stdout=subprocess.PIPE, text=True, **options
    )


def test_what_one_process_commits_another_reads(make, folder: str):
    owner = make()
    worker = Segment.open(owner.path)
    assert owner.committed() == []
    _write(worker, 1)
    (version,) = owner.committed()
    assert (version.version, version.step, version.meta) == (1, 101, b"meta1")
    assert (version.payload == 1).all() and version.payload.ctypes.data % 4096 == 0
    worker.close()
    owner.destroy()
    assert os.listdir(folder) == []


def test_all_memory_is_reserved_and_private(make):
    segment = make(payload_bytes=1 << 20)
    status = os.stat(segment.path)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= status.st_size >= 3 << 20


def test_versions_to_keep_are_not_overwritten(make):
    segment = make()
    for version in (1, 2, 3):
        _write(segment, version)
    assert _versions(segment) == [3, 2, 1]
    draft = segment.begin(4, 104, keep=(3, 2))
    draft.payload[:] = 99
    assert _versions(segment) == [3, 2]
    draft = segment.begin(5, 105, keep=(3, 2))  # 4 was given up: its slot is taken again
    draft.commit(b"")
    assert _versions(segment) == [5, 3, 2]
    with pytest.raises(ValueError, match="all slots hold versions to keep"):
        segment.begin(6, 106, keep=(5, 3, 2))
    assert _versions(segment) == [5, 3, 2]
    assert all((held.payload == held.version).all() for held in segment.committed() if held.version < 4)


def test_versions_rise_unless_the_newer_one_is_discarded(make):
    segment = make()
    _write(segment, 5)
    for again in (5, 4):
        with pytest.raises(ValueError, match=f"version {again} after 5: versions must rise"):
            segment.begin(again, 0)
    segment.discard(5)
    assert _versions(segment) == []
    _write(segment, 4)
    assert _versions(segment) == [4]


def test_a_record_counts_only_when_its_last_byte_is_there(make):
    """The store of the record may be cut short anywhere."""
    segment = make()
    _write(segment, 1)
    start = PAGE_BYTES
    record = segment._memory[start : start + 64].tobytes()
    size = len(record.rstrip(b"\0"))
    for cut in range(size):
        segment._memory[start : start + 64] = 0
        segment._memory[start : start + cut] = np.frombuffer(record[:cut], dtype=np.uint8)
        assert _versions(segment) == [], cut
    segment._memory[start : start + 64] = np.frombuffer(record, dtype=np.uint8)
    assert _versions(segment) == [1]


def test_every_flipped_bit_of_record_or_meta_undoes_the_version(make):
    segment = make()
    _write(segment, 1)
    meta = segment._slot(0)
    for position in [*range(PAGE_BYTES, PAGE_BYTES + 48), *range(meta, meta + 5)]:
        for bit in range(8):
            segment._memory[position] ^= 1 << bit
            assert _versions(segment) == [], position
            segment._memory[position] ^= 1 << bit
    assert _versions(segment) == [1]


def test_a_record_counts_in_its_own_slot_alone(make):
    segment = make()
    _write(segment, 1)
    page = PAGE_BYTES
    segment._memory[2 * page : 3 * page] = segment._memory[page : 2 * page]
    segment._memory[segment._slot(1) : segment._slot(2)] = segment._memory[segment._slot(0) : segment._slot(1)]
    assert [(held.version, held.slot) for held in segment.committed()] == [(1, 0)]


@pytest.mark.parametrize("num_slots", [2, 3])
def test_a_writer_killed_at_any_moment_costs_the_version_it_was_writing(folder: str, num_slots: int):
    """300 times each."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("segment_killer.py")), folder, str(num_slots), "300"],
        env=os.environ | {"PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["kills"] == 300
    # Otherwise the kills did not hit what they were meant to.
    assert result["while_writing"] > 100 and result["versions"] > 300, result
    assert os.listdir(folder) == []


def test_a_second_writer_is_refused_until_the_first_is_gone(make):
    segment = make()
    program = """
import sys
from checkpoint.snapshots.segment import Segment
draft = Segment.open(sys.argv[1]).begin(1, 1)
print("writing", flush=True)
sys.stdin.read()
"""
    writer = _run(program, str(segment.path), stdin=subprocess.PIPE)
    assert writer.stdout.readline() == "writing\n"
    with pytest.raises(SegmentError, match="another process is writing"):
        segment.begin(2, 2)
    writer.kill()
    writer.communicate()
    _write(segment, 2)
    assert _versions(segment) == [2]


_OWNER = """
import sys, time
from checkpoint.snapshots.segment import Segment
folder, run, label = sys.argv[1:]
segment = Segment.create(bytes.fromhex(run), label, num_slots=2, payload_bytes=4096, meta_bytes=10, folder=folder)
draft = segment.begin(1, 1)
draft.payload[:] = 7
draft.commit(b"x")
print("made", flush=True)
time.sleep(100)
"""


def test_what_a_dead_owner_left_is_found_and_removed(folder: str):
    dead, alive = (_run(_OWNER, folder, _RUN.hex(), label) for label in ("dead", "alive"))
    other = _run(_OWNER, folder, bytes(16).hex(), "dead")
    Path(folder, "atoll-not-a-segment").touch()
    Path(folder, f"atoll-{_RUN.hex()}-halfmade").touch(mode=0o600)  # its maker died before it had any size
    for owner in (dead, alive, other):
        assert owner.stdout.readline() == "made\n"
    for owner in (dead, other):
        os.kill(owner.pid, signal.SIGKILL)
        owner.communicate()
    expected = [f"atoll-{bytes(16).hex()}-dead", f"atoll-{_RUN.hex()}-dead", f"atoll-{_RUN.hex()}-halfmade"]
    assert [left.name for left in remove_leftovers(folder)] == expected
    assert sorted(os.listdir(folder)) == [f"atoll-{_RUN.hex()}-alive", "atoll-not-a-segment"]
    alive.kill()
    alive.communicate()


def test_ownership_ends_with_close_even_while_a_view_is_used(make, folder: str):
    segment = make()
    _write(segment, 1)
    payload = segment.committed()[0].payload
    segment.close()
    assert remove_leftovers(folder) == [segment.path]
    assert (payload == 1).all()


def test_a_taken_name_is_refused(make):
    segment = make()
    with pytest.raises(SegmentError, match="exists"):
        make()
    _write(segment, 1)
    assert _versions(segment) == [1]


def test_what_was_swept_before_it_was_locked_is_made_again(make, folder: str, monkeypatch: pytest.MonkeyPatch):
    swept = []
    real = segment_files.fcntl.flock

    def flock(fd: int, kind: int) -> None:
        if not swept:
            monkeypatch.setattr(segment_files.fcntl, "flock", real)
            swept.extend(remove_leftovers(folder))
        real(fd, kind)

    monkeypatch.setattr(segment_files.fcntl, "flock", flock)
    segment = make()
    assert swept == [segment.path] and segment.path.exists()
    assert remove_leftovers(folder) == []


def test_more_than_there_is_free_is_refused_and_leaves_nothing(make, folder: str):
    free = os.statvfs(folder)
    with pytest.raises(SegmentError, match=r"need \d+ bytes of shared memory, \d+ are free; .*checkpoint.parity"):
        make(payload_bytes=free.f_bavail * free.f_frsize // 2)
    assert os.listdir(folder) == []


def test_foreign_files_are_refused(make, folder: str):
    segment = make()
    link = Path(folder, "link")
    link.symlink_to(segment.path)
    with pytest.raises(OSError):
        Segment.open(link)
    link.unlink()
    os.chmod(segment.path, 0o644)
    with pytest.raises(SegmentError, match="mode 0600, is -rw-r--r--"):
        Segment.open(segment.path)
    noise = Path(folder, "noise")
    noise.write_bytes(os.urandom(8192))
    noise.chmod(0o600)
    with pytest.raises(SegmentError, match="not a segment"):
        Segment.open(noise)
    os.truncate(noise, 10)
    with pytest.raises(SegmentError, match="not a segment"):
        Segment.open(noise)


def test_slots_are_alike_in_the_lower_bits_of_their_addresses(make):
    segment = make()
    first, second = (segment.slot_memory(slot).ctypes.data for slot in (0, 1))
    assert (second - first) % STRIDE_BYTES == 0 and second - first >= 4096 + 8192


def test_too_much_meta_is_refused(make):
    segment = make()
    draft = segment.begin(1, 1)
    with pytest.raises(ValueError, match="room for 4096 and 8192"):
        draft.commit(bytes(4097))
    assert _versions(segment) == []


@pytest.mark.parametrize("label, num_slots", [("../x", 2), ("", 2), ("r0", 1)])
def test_bad_segments_are_refused(make, label: str, num_slots: int):
    with pytest.raises(ValueError, match="segment atoll-"):
        make(label, num_slots)
