"""What is restored into memory that is there: every range into its place, and nothing from a chunk that is not good."""

import fcntl
import itertools
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointDamaged, CheckpointError, CheckpointOptions, Checkpoints
from checkpoint.persisted.layout import CRC_BYTES
from offload.state import Piece

_MIB = 1 << 20
_EXT4_IOC_SHUTDOWN = 0x8004587D
_SIZES = (3 * _MIB // 2 + 7, 5, 700_001, 1, 0, 4099, _MIB)
_KINDS = ("master", "exp_avg")


def _piece(name: str, kind: str, whole: torch.Tensor, start: int, tensor: torch.Tensor) -> Piece:
    stop = start + len(tensor)
    return Piece(name=name, kind=kind, start=start, stop=stop, shape=tuple(whole.shape), tensor=tensor)


def _state(dtype: torch.dtype = torch.float32) -> dict[tuple[str, str], torch.Tensor]:
    return {(f"p{size}", kind): torch.rand(size).to(dtype) for size in _SIZES for kind in _KINDS}


def _saved(folder: Path, state: dict[tuple[str, str], torch.Tensor], chunk_bytes: int = 2 * _MIB) -> Checkpoints:
    store = Checkpoints(str(folder), CheckpointOptions(chunk_bytes=chunk_bytes))
    store.save(1, [_piece(*key, whole, 0, whole) for key, whole in state.items()], {}, {})
    store.wait()
    assert store.error() is None
    return store


# Read past the page cache as one chunk or several, by it where they are short, and cut anywhere, as older versions did.
@pytest.mark.parametrize("chunk_bytes", [64 * _MIB, 2 * _MIB, 256 << 10, 2 * _MIB + 12])
@pytest.mark.parametrize("num_cuts", [0, 3])
def test_every_range_is_put_into_its_place_and_nothing_beside_it(tmp_path: Path, chunk_bytes: int, num_cuts: int):
    state = _state()
    reader = _saved(tmp_path, state, chunk_bytes).open(1)
    generator = torch.Generator().manual_seed(num_cuts)
    memory, pieces = {}, []
    for key, whole in state.items():
        memory[key] = torch.full((len(whole) + 2,), -7.0)  # an element before and one behind
        cuts = torch.randint(len(whole) + 1, (num_cuts,), generator=generator).tolist()
        for start, stop in itertools.pairwise(sorted([0, *cuts, len(whole)])):
            pieces.append(_piece(*key, whole, start, memory[key][1 + start : 1 + stop]))
    reader.fill(reversed(pieces))
    for key, whole in state.items():
        assert torch.equal(memory[key], torch.cat((torch.tensor([-7.0]), whole, torch.tensor([-7.0])))), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_another_dtype_or_with_gaps_is_filled_too(tmp_path: Path, dtype: torch.dtype):
    state = _state(dtype)
    reader = _saved(tmp_path, state).open(1)
    filled = {key: torch.zeros(2 * len(whole), dtype=torch.float64)[::2] for key, whole in state.items()}
    reader.fill(_piece(*key, whole, 0, filled[key]) for key, whole in state.items())
    assert all(torch.equal(filled[key], whole.double()) for key, whole in state.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_filled(tmp_path: Path):
    state = {key: whole.cuda() for key, whole in _state().items()}
    reader = _saved(tmp_path, state).open(1)
    filled = {key: torch.zeros_like(whole) for key, whole in state.items()}
    reader.fill(_piece(*key, whole, 0, filled[key]) for key, whole in state.items())
    assert all(torch.equal(filled[key], whole) for key, whole in state.items())


def test_a_part_is_filled_from_the_chunks_that_it_touches_alone(tmp_path: Path):
    whole = torch.rand(4 * _MIB)  # eight chunks
    store = _saved(tmp_path, {("w", "master"): whole})
    reader = store.open(1)
    for number in (0, 1, 2, 5, 6, 7):
        _chunk(tmp_path, number).unlink()
    out = torch.zeros(_MIB // 2 + 3)
    reader.fill([_piece("w", "master", whole, 3 * _MIB // 2 + 1, out)])
    assert torch.equal(out, whole[3 * _MIB // 2 + 1 :][: len(out)])


def test_a_chunk_is_read_once_whoever_wants_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = _state()
    reader = _saved(tmp_path, state).open(1)
    opened: list[str] = []
    opening = os.open
    monkeypatch.setattr(os, "open", lambda path, *args: (opened.append(str(path)), opening(path, *args))[1])
    reader.fill(_piece(*key, whole, 0, torch.empty_like(whole)) for key, whole in state.items())
    chunks = [str(path) for path in tmp_path.rglob("c/*")]
    assert len(chunks) > 8 and sorted(opened) == sorted(chunks)


@pytest.mark.parametrize("number", [0, 3, 7])
def test_nothing_of_a_damaged_chunk_is_restored(tmp_path: Path, number: int):
    whole = torch.rand(4 * _MIB) + 1
    reader = _saved(tmp_path, {("w", "master"): whole}).open(1)
    with open(_chunk(tmp_path, number), "r+b") as file:
        file.seek(12345)
        file.write(bytes(4))
    out = torch.zeros(len(whole))
    with pytest.raises(CheckpointDamaged, match=rf"c/{number}.*its CRC-32C is wrong"):
        reader.fill([_piece("w", "master", whole, 0, out)])
    assert not out.view(8, -1)[number].any()


@pytest.mark.parametrize("size", [0, 4096, 2 * _MIB, 2 * _MIB + CRC_BYTES - 1])
def test_a_file_that_became_short_since_it_was_opened_is_damage(tmp_path: Path, size: int):
    whole = torch.rand(4 * _MIB)
    reader = _saved(tmp_path, {("w", "master"): whole}).open(1)
    os.truncate(_chunk(tmp_path, 5), size)
    with pytest.raises(CheckpointDamaged, match=rf"c/5.*has {size} bytes instead of {2 * _MIB + CRC_BYTES}"):
        reader.fill([_piece("w", "master", whole, 0, torch.empty(len(whole)))])


def test_what_is_not_there_is_refused_before_anything_is_touched(tmp_path: Path):
    whole = torch.rand(100)
    reader = _saved(tmp_path, {("w", "master"): whole}).open(1)
    out = torch.zeros(100)
    with pytest.raises(KeyError, match="no exp_avg of w"):
        reader.fill([_piece("w", "master", whole, 0, out), _piece("w", "exp_avg", whole, 0, out)])
    with pytest.raises(ValueError, match="elements 1:101 of w"):
        reader.fill([_piece("w", "master", whole, 0, out), _piece("w", "master", whole, 1, out)])
    assert not out.any()


@pytest.fixture
def mortal_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own, which can be shut down: all that is asked of it is EIO then."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(96 * _MIB)
    commands = [["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(disk)]]
    if os.geteuid() != 0 or any(subprocess.run(command, capture_output=True).returncode for command in commands):
        pytest.skip("needs the right to mount an ext4 file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def _shut_down(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", 2))  # without writing anything more
    os.close(fd)


def test_a_drive_that_fails_ends_the_restore_with_its_error(mortal_disk: Path):
    whole = torch.rand(4 * _MIB)
    reader = _saved(mortal_disk / "checkpoints", {("w", "master"): whole}).open(1)
    _shut_down(mortal_disk)
    with pytest.raises(CheckpointError, match=r"disk/checkpoints/step-00000001/.*cannot be read: .*Input/output error"):
        reader.fill([_piece("w", "master", whole, 0, torch.empty(len(whole)))])


def test_a_drive_that_fails_costs_the_save_alone(mortal_disk: Path):
    whole = torch.rand(4 * _MIB)
    store = _saved(mortal_disk / "checkpoints", {("w", "master"): whole})
    _shut_down(mortal_disk)
    store.save(2, [_piece("w", "master", whole, 0, whole)], {}, {})
    store.wait()
    assert "step 2 was not written" in str(store.error()) and "Input/output error" in str(store.error())


def test_a_copy_that_fails_ends_its_save_and_not_the_next(tmp_path: Path):
    whole = torch.rand(4 * _MIB)
    store = _saved(tmp_path, {("w", "master"): whole})
    lost = torch.empty(7, device="meta")  # there is nothing to be copied
    with pytest.raises(NotImplementedError):
        store.save(2, [_piece("w", "master", whole, 0, whole), _piece("x", "master", lost, 0, lost)], {}, {})
    store.wait()
    assert "could not be copied to host memory" in str(store.error()) and store.steps() == [1]
    store.save(3, [_piece("w", "master", whole, 0, whole * 3)], {}, {})
    store.wait()
    assert store.error() is None
    assert torch.equal(store.open(3).read("w", "master", 0, len(whole)), whole * 3)


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"step-00000001/shards/00000/master.float32/c/{number}"
