"""What is read back is what was saved, by any ranges."""

import itertools
from pathlib import Path

import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import CheckpointOptions, Checkpoints
from offload.state import Piece

_DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
_memory_urls = (f"memory://roundtrip-{number}" for number in itertools.count())


def _random(numel: int, dtype: torch.dtype) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (numel * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_every_dtype_and_shape_comes_back_bit_for_bit(store, whole):
    tensors = {f"layer.{dtype}": _random(3 * 1001, dtype).reshape(3, 7, 143) for dtype in _DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    store.save(7, [whole(name, tensor) for name, tensor in tensors.items()], {}, {})
    store.wait()
    reader = store.open(7)
    assert reader.names() == list(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name, "master") == tuple(tensor.shape)
        assert reader.dtype(name, "master") == tensor.dtype
        assert _same(reader.read(name, "master", 0, tensor.numel()), tensor.flatten())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_pieces_agree_with_a_dict(data):
    sizes = data.draw(st.lists(st.integers(0, 5000), min_size=1, max_size=4), label="sizes")
    state, pieces = {}, []
    for number, numel in enumerate(sizes):
        for kind in ("master", "exp_avg"):
            tensor = _random(numel, data.draw(st.sampled_from(_DTYPES[:4]), label="dtype"))
            state[f"p{number}", kind] = tensor
            cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=3), label="cuts")})
            ranges = list(itertools.pairwise(cuts)) or [(0, 0)]
            pieces += [
                Piece(name=f"p{number}", kind=kind, start=a, stop=b, shape=(numel,), tensor=tensor[a:b])
                for a, b in ranges
            ]
    store = Checkpoints(next(_memory_urls), CheckpointOptions(chunk_bytes=4096))
    store.save(1, data.draw(st.permutations(pieces), label="order"), {}, {})
    store.wait()
    reader = store.open(1)
    for (name, kind), tensor in state.items():
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(tensor))] * 2), label="range"))
        assert _same(reader.read(name, kind, start, stop), tensor[start:stop])


def test_meta_and_rank_state_come_back(store, whole):
    rank_state = {
        "rng": torch.arange(9, dtype=torch.uint8),
        "key": b"\0\xff",
        "gauss": 0.1,
        "more": [1, None, {"a": True}],
    }
    store.save(3, [whole("w", torch.ones(2))], rank_state, {"config": {"lr": 3e-4}, "tokens": 1 << 60})
    store.wait()
    reader = store.open(3)
    assert reader.meta == {"config": {"lr": 3e-4}, "tokens": 1 << 60}
    read = reader.rank_state(0)
    assert torch.equal(read.pop("rng"), rank_state.pop("rng"))
    assert read == rank_state
    with pytest.raises(KeyError, match="no rank 1"):
        reader.rank_state(1)


def test_what_is_changed_after_save_is_not_written(store, whole):
    weight = torch.zeros(1000)
    meta = {"step": 1}
    store.save(1, [whole("w", weight)], {}, meta)
    weight.fill_(9)
    meta["step"] = 2
    store.wait()
    assert store.open(1).read("w", "master", 0, 1000).eq(0).all()
    assert store.open(1).meta == {"step": 1}


def test_zeros_are_written_like_everything_else(store, whole, tmp_path):
    store.save(1, [whole("w", torch.zeros(10_000))], {}, {})
    store.wait()
    chunks = list((tmp_path / "checkpoints").rglob("c/*"))
    assert sum(chunk.stat().st_size - 4 for chunk in chunks) >= 40_000
    store.open(1).verify()


def test_only_overlapping_chunks_are_read(store, whole, tmp_path):
    tensor = torch.arange(4096.0)  # four chunks
    store.save(1, [whole("w", tensor)], {}, {})
    store.wait()
    reader = store.open(1)
    for number in (0, 2, 3):
        (tmp_path / f"checkpoints/step-00000001/shards/00000/master.float32/c/{number}").unlink()
    assert torch.equal(reader.read("w", "master", 1024, 2048), tensor[1024:2048])


def test_plain_zarr_reads_it(store, whole, tmp_path):
    fp32, bf16 = torch.randn(3000), torch.randn(100).bfloat16()
    store.save(1, [whole("a", fp32), whole("b", bf16)], {}, {})
    store.wait()
    shard = zarr.open_group(tmp_path / "checkpoints/step-00000001", mode="r")["shards/00000"]
    assert torch.equal(torch.from_numpy(shard["master.float32"][:]), fp32)
    assert torch.equal(torch.from_numpy(shard["master.bfloat16"][:]).view(torch.bfloat16), bf16)
    assert shard["master.bfloat16"].attrs["torch_dtype"] == "bfloat16"


def test_unknown_state_and_ranges_are_refused(store, whole):
    store.save(1, [whole("w", torch.ones(4))], {}, {})
    store.wait()
    reader = store.open(1)
    with pytest.raises(KeyError, match="no exp_avg of w"):
        reader.read("w", "exp_avg", 0, 1)
    with pytest.raises(ValueError, match="0:5"):
        reader.read("w", "master", 0, 5)


def test_host_buffers_are_reused(store, whole):
    tensor = torch.ones(5000)
    store.save(1, [whole("w", tensor)], {}, {})
    before = store._staging._buffers["master", "float32"].data_ptr()
    store.save(2, [whole("w", tensor + 1)], {}, {})
    store.wait()
    assert store._staging._buffers["master", "float32"].data_ptr() == before
    assert store.open(2).read("w", "master", 0, 5000).eq(2).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_on_a_gpu_is_copied_before_the_next_update(tmp_path: Path, whole):
    store = Checkpoints(str(tmp_path), CheckpointOptions())
    weight = torch.zeros(1 << 24, device="cuda")
    for step in (1, 2):  # the second save reuses the page-locked buffers
        weight.fill_(step)
        store.save(step, [whole("w", weight)], {}, {})
        weight.fill_(-1)
    store.wait()
    for step in (1, 2):
        assert store.open(step).read("w", "master", 0, 1 << 24).eq(step).all()
    store.close()
