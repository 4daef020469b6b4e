"""``offload.activations=auto`` takes what fits, in the order of what it costs: by tiles where nothing else does."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offload.activations.plan import DriveRoom
from offload.options import ActivationOptions, OffloadOptions
from parallel.options import ParallelOptions
from tests.offload.leaving import one_thread
from tests.trainer.test_activations import MODEL, data, kept, run
from tests.trainer.test_footprint import LAYERS, found
from tests.trainer.test_out_of_memory import full_once
from trainer.build import Rank
from trainer.fit_activations import ActivationBudget, Narrowed, narrow, settle
from trainer.footprint import Footprint, footprint
from trainer.job import Job
from trainer.models import build_model, llama
from trainer.options import HFOptions, TrainOptions
from trainer.probe import probe

__all__ = ["data", "kept", "one_thread"]
AUTO = ActivationOptions(mode="auto", keep_last=2, tile_tokens=32)


@pytest.fixture(scope="module")
def sizes() -> Footprint:
    return found(AUTO)


def takes(sizes: Footprint, keep_last: int = 0, mode: str = "swap") -> int:
    return sizes.device_bytes(replace(AUTO, mode=mode, alpha=0.0 if mode == "swap" else None, keep_last=keep_last))


def narrowed(sizes: Footprint, device_bytes: int, host_bytes: float = math.inf, **room: Any) -> Narrowed:
    return narrow(AUTO, sizes, ActivationBudget(device_bytes=device_bytes, host_bytes=host_bytes, **room), 1.0)


def test_it_stays_as_asked_where_that_fits(sizes: Footprint) -> None:
    assert narrowed(sizes, takes(sizes, 2)) == Narrowed(AUTO, 0, takes(sizes, 2), "")


@pytest.mark.parametrize(("mode", "states", "counted"), [
    ("swap", "auto", True), ("input", "auto", True), ("keep", "auto", False), ("swap", "host", False),
])  # fmt: skip
def test_states_are_chosen_beside_blocks_that_swap(mode: str, states: str, counted: bool) -> None:
    """What is measured for it are blocks that recompute, which keep more or less than those."""
    options = ActivationOptions(mode=mode, keep_last=1)
    known = {"device_bytes": 1 << 30} if states == "auto" else {}
    job = Job(model=MODEL, train=TrainOptions(seq_len=64, global_batch_size=2),
              offload=OffloadOptions(states=states, activations=options, **known))  # fmt: skip
    cpu, meta = torch.device("cpu"), torch.device("meta")
    model = build_model(job.model, vocab_size=256, seq_len=64, dtype=torch.float32, device=meta)
    same, taken = settle(job, model, Rank(0, 1, cpu), torch.float32, print)
    whole = footprint(job, vocab_size=256, micro_batch_size=2, dtype=torch.float32).device_bytes(options)
    assert same is job and taken == (whole if counted else None)


def test_fewer_blocks_keep_before_anything_else_is_changed(sizes: Footprint) -> None:
    for keep_last in (1, 0):
        less = narrowed(sizes, takes(sizes, keep_last + 1) - 1)
        assert less.options == replace(AUTO, keep_last=keep_last)
        assert f"with {keep_last} they fit" in less.why and "offload.activations.keep_last" in less.why


def test_then_input_alone_then_tiles(sizes: Footprint) -> None:
    before = narrowed(sizes, takes(sizes) - 1)
    assert before.options == replace(AUTO, mode="input", keep_last=0)
    tiles = narrowed(sizes, takes(sizes, mode="input") - 1)
    assert tiles.options == replace(AUTO, mode="stream", keep_last=0)
    assert tiles.rung > before.rung > 0 and "tiles of 32 tokens" in tiles.why
    assert narrowed(sizes, 0).options == tiles.options, "the least that there is, where not even that fits by count"


def test_tiles_that_would_take_more_are_not_taken(sizes: Footprint) -> None:
    large = narrowed(replace(sizes, stream_bytes=takes(sizes)), 0)
    assert large.options == AUTO and "offload.activations.tile_tokens" in large.why


def test_host_memory_says_what_tiles_leave(sizes: Footprint) -> None:
    both, inputs = LAYERS * (sizes.input_bytes + sizes.attention_bytes), LAYERS * sizes.input_bytes
    most = takes(sizes, mode="input") - 1
    assert narrowed(sizes, most, both).options.mode == "stream"
    assert narrowed(sizes, most, both - 1).options.mode == "stream_input"
    assert narrowed(sizes, most, inputs).options.mode == "stream_input"
    none = narrowed(sizes, most, inputs - 1)
    assert none.options == AUTO and "offload.nvme_path" in none.why


def test_drives_hold_what_host_memory_does_not(sizes: Footprint) -> None:
    """Attention's output where writing it hides, else inputs."""
    two = 2 * (sizes.input_bytes + sizes.attention_bytes)
    most, asked = takes(sizes, mode="input") - 1, []

    def drives(bytes_per_s: float) -> DriveRoom:
        asked.append(bytes_per_s)
        return DriveRoom(1e12, bytes_per_s)

    assert narrowed(sizes, most, two, drives=lambda: drives(1e12)).options.mode == "stream"
    assert narrowed(sizes, most, two, drives=lambda: drives(1.0)).options.mode == "stream_input"
    assert narrowed(sizes, most, drives=lambda: drives(1.0)).options.mode == "stream"
    assert narrowed(sizes, 10 * takes(sizes, 2), two, drives=lambda: drives(1.0)).options == AUTO
    assert asked == [1e12, 1.0], "they are not measured where host memory is enough, or the device"


def test_where_host_memory_is_short_auto_takes_what_inputs_take(sizes: Footprint) -> None:
    """It never swaps more then, so that it need not fit."""
    inputs = LAYERS * sizes.input_bytes
    assert narrowed(sizes, takes(sizes, mode="input"), inputs).options == replace(AUTO, keep_last=0)


def test_what_cannot_run_by_tiles_is_left_as_it_is(sizes: Footprint) -> None:
    refused = narrowed(sizes, 1, refused="set train.dtype=bf16")
    assert refused.options == AUTO and refused.why.endswith("cannot run by tiles: set train.dtype=bf16")
    other = narrowed(replace(sizes, stream_bytes=None), 1)
    assert other.options == AUTO and "does not say how its blocks do" in other.why


# ---------------------------------------------------------------------------------------------------- runs


def auto(root: Path, data: Path, device_bytes: int, **options: Any) -> tuple[list[float], str]:
    offload = {"device_bytes": device_bytes, **options.pop("offload", {})}
    return run(root, "auto", data, offload=offload, mode="auto", tile_tokens=24, **options)


def test_a_run_that_fits_by_tiles_alone_takes_them(tmp_path: Path, data: Path, kept: list[float]) -> None:
    """Bitwise the run that names them."""
    losses, text = auto(tmp_path, data, 3_000_000)
    assert "offload.activations=auto: offload.activations=stream: by count 0 GiB of the device" in text
    assert "4 run by tiles of 24 tokens" in text
    assert losses == run(tmp_path, "stream", data, mode="stream", tile_tokens=24)[0]
    assert losses == pytest.approx(kept, rel=1e-5)


def test_a_run_that_fits_stays_as_it_was(tmp_path: Path, data: Path) -> None:
    _, text = auto(tmp_path, data, 2**34)
    assert "by count" not in text and "activations: 2 blocks swap" in text


def test_states_are_chosen_for_what_was_chosen_of_activations(tmp_path: Path, data: Path) -> None:
    """With ``offload.states=auto`` too; what measures it runs as the job does."""
    _, text = auto(tmp_path, data, 2_050_000, offload={"states": "auto", "threads": 1})
    assert "offload.activations=auto: offload.activations=stream" in text
    assert "offload.states=auto: offload.states=host" in text and "predicted: " in text


def test_a_model_that_does_not_run_by_tiles_says_so_and_goes_on(tmp_path: Path, data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.Qwen3Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    ).save_pretrained(tmp_path / "hf")  # fmt: skip
    model = HFOptions(path=str(tmp_path / "hf"), from_scratch=True)
    _, text = run(tmp_path, "hf", data, model=model, offload={"device_bytes": 1000}, mode="auto")
    assert "cannot run by tiles: offload.activations.mode=stream: Qwen3DecoderLayer does not say how" in text


# ---------------------------------------------------------------------------------------------------- the probe


def measure(**offload: Any) -> None:
    job = Job(model=MODEL, train=TrainOptions(seq_len=32), offload=OffloadOptions(threads=1, **offload))
    probe(job, micro_batch_size=2, vocab_size=64, dtype=torch.float32, device=torch.device("cpu"))


def test_the_probe_tiles_as_the_job_does(monkeypatch: pytest.MonkeyPatch) -> None:
    most, swiglu = [0], llama.swiglu

    def watched(x: Tensor) -> Tensor:
        most.append(x.numel() // x.size(-1))
        return swiglu(x)

    monkeypatch.setattr(llama, "swiglu", watched)
    measure(states="host", activations=ActivationOptions(mode="auto", tile_tokens=24))
    assert max(most) == 24


def test_the_probe_has_a_part_of_sequences_that_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is over all tokens, for its heads; all else of the longest part."""
    seen: set[tuple[int, ...]] = set()
    real, swiglu = F.scaled_dot_product_attention, llama.swiglu

    def attention(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.add(tuple(q.shape))
        return real(q, *args, **kwargs)

    def watched(x: Tensor) -> Tensor:
        seen.add(tuple(x.shape))
        return swiglu(x)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(llama, "swiglu", watched)
    job = Job(
        model=MODEL,
        train=TrainOptions(seq_len=31),
        parallel=ParallelOptions(levels={"gpu": 2}, sequence="gpu"),
    )
    probe(job, micro_batch_size=2, vocab_size=64, dtype=torch.float32, device=torch.device("cpu"))
    assert seen == {(2, MODEL.num_heads // 2, 31, MODEL.head_dim), (2, 16, 2 * MODEL.ffn_dim)}


def test_a_probe_that_does_not_fit_has_its_weights_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the job's states are away."""
    real, tier = llama.swiglu, []
    monkeypatch.setattr(llama, "swiglu", full_once(real))
    build = probe.__globals__["build_engine"]
    monkeypatch.setitem(
        probe.__globals__, "build_engine", lambda job, *a, **k: tier.append(job.offload.weights) or build(job, *a, **k)
    )
    measure(states="host", weights="host")
    assert tier == ["device", "host"]
    monkeypatch.setattr(llama, "swiglu", full_once(real))
    with pytest.raises(torch.OutOfMemoryError):
        measure()
