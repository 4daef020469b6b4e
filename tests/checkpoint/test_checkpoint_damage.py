"""A checkpoint that is not what was written is refused, and the one before it is offered."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointDamaged, CheckpointError, CheckpointOptions, CheckpointReader, Checkpoints, rng_state
from checkpoint.crc import crc32c
from checkpoint.persisted.layout import Commit, Entry
from offload.state import Piece

_TENSOR = torch.arange(3001.0)  # not a multiple of the chunks: the last one is padded
_FILES = [
    "COMMIT",
    "meta.json",
    "zarr.json",
    "shards/zarr.json",
    "shards/00000/zarr.json",
    "shards/00000/index.json",
    "shards/00000/rank_state.json",
    *(
        f"shards/00000/{kind}.float32/{file}"
        for kind in ("master", "exp_avg")
        for file in ("zarr.json", "c/0", "c/1", "c/2")
    ),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good checkpoints of steps 40 and 60."""
    folder = tmp_path_factory.mktemp("good")
    store = Checkpoints(str(folder), CheckpointOptions(chunk_bytes=4096))
    for step in (40, 60):
        pieces = [
            Piece(name="w", kind=kind, start=0, stop=3001, shape=(3001,), tensor=_TENSOR + step)
            for kind in ("master", "exp_avg")
        ]
        store.save(step, pieces, {"rng": rng_state()}, {"step": step})
        store.wait()
    return folder


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    """A copy of step 60's folder, to be damaged, beside the good step 40."""
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy" / "step-00000060"


def _read_all(step_folder: Path, step: int = 60) -> CheckpointReader:
    reader = Checkpoints(str(step_folder.parent), CheckpointOptions()).open(step)
    for kind in ("master", "exp_avg"):
        assert torch.equal(reader.read("w", kind, 0, 3001), _TENSOR + step)
    reader.rank_state(0)
    reader.verify()
    return reader


def _reseal(folder: Path, path: str, content: bytes) -> None:
    """Put `content` in place of a file, with a marker that vouches for it: what a stranger could make."""
    commit = Commit.loads((folder / "COMMIT").read_bytes())
    (folder / path).write_bytes(content)
    files = commit.files | {path: Entry(len(content), crc32c(content))}
    (folder / "COMMIT").write_bytes(Commit(step=60, world=1, files=files).dumps())


def test_the_list_of_files_here_is_complete(good: Path):
    folder = good / "step-00000060"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(_FILES)
    _read_all(folder)


@pytest.mark.parametrize("file", _FILES)
def test_one_flipped_bit_is_detected_wherever_it_is(damaged: Path, file: str):
    content = (damaged / file).read_bytes()
    generator = torch.Generator().manual_seed(len(content))
    positions = {0, len(content) - 1, *torch.randint(len(content), (6,), generator=generator).tolist()}
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (damaged / file).write_bytes(flipped)
        with pytest.raises(CheckpointDamaged, match="run.resume=40") as caught:
            _read_all(damaged)
        assert caught.value.step == 60 and caught.value.good_step == 40
        assert caught.value.file.endswith(file)


@pytest.mark.parametrize("file", _FILES)
def test_a_short_file_is_detected_when_it_is_opened(damaged: Path, file: str):
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(content[:-1])
    with pytest.raises(CheckpointDamaged, match=f"{file}.*run.resume=40"):
        Checkpoints(str(damaged.parent), CheckpointOptions()).open(60)


@pytest.mark.parametrize("file", _FILES[1:])
def test_a_missing_file_is_detected_when_it_is_opened(damaged: Path, file: str):
    (damaged / file).unlink()
    with pytest.raises(CheckpointDamaged, match=f"{file}: is missing.*run.resume=40"):
        Checkpoints(str(damaged.parent), CheckpointOptions()).open(60)


def test_chunks_that_changed_places_are_detected(damaged: Path):
    chunks = damaged / "shards/00000/master.float32/c"
    first, second = (chunks / "0").read_bytes(), (chunks / "1").read_bytes()
    (chunks / "0").write_bytes(second)
    (chunks / "1").write_bytes(first)
    with pytest.raises(CheckpointDamaged, match="CRC-32C"):
        _read_all(damaged)


def test_without_its_marker_it_is_no_checkpoint(damaged: Path):
    (damaged / "COMMIT").unlink()
    store = Checkpoints(str(damaged.parent), CheckpointOptions())
    assert store.steps() == [40]
    with pytest.raises(CheckpointError, match="no checkpoint of step 60 .* there is: 40"):
        store.open(60)


def test_the_step_offered_is_itself_good(damaged: Path):
    (damaged / "meta.json").unlink()
    (damaged.parent / "step-00000040/meta.json").write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match="there is no good one before it"):
        _read_all(damaged)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", _FILES)
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_is_refused_and_never_run(damaged: Path, tmp_path: Path, file: str, vouched: bool):
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    pickle.loads(bomb).close()
    (tmp_path / "exploded").unlink()  # it is a real one
    if vouched and file != "COMMIT":
        _reseal(damaged, file, bomb)
    else:
        (damaged / file).write_bytes(bomb)
    if vouched and file.endswith("zarr.json"):
        _read_all(damaged)  # only for other readers of zarr; we never parse it
    else:
        with pytest.raises(CheckpointDamaged):
            _read_all(damaged)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "../../../other"},
        {"dtype": "object"},
        {"length": -1},
        {"length": 1 << 62},
        {"chunk": 0},
        {"chunk": True},
        {"chunk": "1"},
        {"extra": 1},
    ],
)
def test_a_strangers_array_cannot_escape_or_confuse(damaged: Path, change: dict[str, object]):
    index = json.loads((damaged / "shards/00000/index.json").read_bytes())
    index["arrays"][0] |= change
    _reseal(damaged, "shards/00000/index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointDamaged):
        _read_all(damaged)


@pytest.mark.parametrize(
    "change",
    [{"start": 1}, {"stop": 3000}, {"shape": [1 << 40]}, {"shape": 3}, {"offset": 1}, {"offset": -1}, {"name": 3}],
)
def test_a_strangers_piece_cannot_escape_or_confuse(damaged: Path, change: dict[str, object]):
    index = json.loads((damaged / "shards/00000/index.json").read_bytes())
    index["pieces"][0] |= change
    _reseal(damaged, "shards/00000/index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointDamaged):
        _read_all(damaged)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "a/../../b", "a//b", ".hidden", ""])
def test_a_strangers_marker_cannot_name_files_elsewhere(damaged: Path, path: str):
    commit = Commit.loads((damaged / "COMMIT").read_bytes())
    (damaged / "COMMIT").write_bytes(Commit(step=60, world=1, files=commit.files | {path: Entry(0, 0)}).dumps())
    with pytest.raises(CheckpointDamaged, match="path"):
        _read_all(damaged)


@pytest.mark.parametrize("text", [b"[" * 200_000, b"{", b"null", b"[]", b"\xff\xfe", b'{"arrays": 1, "pieces": []}'])
def test_malformed_json_is_damage(damaged: Path, text: bytes):
    _reseal(damaged, "shards/00000/index.json", text)
    with pytest.raises(CheckpointDamaged, match="index.json"):
        _read_all(damaged)


def test_a_marker_of_another_step_is_damage(damaged: Path):
    damaged.rename(damaged.with_name("step-00000080"))
    with pytest.raises(CheckpointDamaged, match="is of step 60"):
        _read_all(damaged.with_name("step-00000080"), 80)
