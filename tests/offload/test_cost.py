"""The model of a step's time against figures that one H200 machine gave, and against what must hold of any."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import cost
from offload.cost import COMPUTE, DRIVE, HOST, OUT, Layer, Rates, predict
from offload.options import OffloadOptions
from offload.placing import Part, place
from offload.shard import Buffers

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHAPES = {  # hidden, ffn, layers, heads, kv heads, head size: conf/model
    "1b": (2048, 8192, 16, 32, 8, 64),
    "3b": (3072, 8192, 28, 24, 8, 128),
    "8b": (4096, 14336, 32, 32, 8, 128),
}
WORDS, GIB = 32000, 2**30
RATES = Rates(update=3e8, pingpong=4e8, weights=5e8, states=3e8, resident=5e10, into=2e10, out=2e10, drive=2e9)


def recorded_rates() -> tuple[Rates, float]:
    """Of that machine alone, from benchmarks/host.py and in_memory.py, and docs/offload.md for the drive and the links:
    not from the runs that are predicted. And its FLOP/s in a step all in memory."""
    host = {row["side"]: row for row in json.loads((RESULTS / "host_h200.json").read_text())["rows"]}
    in_memory = json.loads((RESULTS / "in_memory.json").read_text())["rows"]
    flops = max(row["ours"]["model_TFLOPs"] for row in in_memory if row["case"].startswith("3b:4096")) * 1e12
    rates = Rates(
        update=host["adamw in place"]["gparams_per_s"] * 1e9,
        pingpong=host["adamw ping-pong"]["gparams_per_s"] * 1e9,
        weights=host["adamw in place"]["gparams_per_s"] * 1e9 * 28 / 16,  # by their bytes: that run had no rows of them
        states=host["adamw in place"]["gparams_per_s"] * 1e9 * 28 / 26,
        resident=8e10,
        into=50e9,
        out=50e9,
        drive=2.3e9,
    )
    return rates, flops


def llama(model: str, seq_len: int, sequences: int, flops: float) -> list[Layer]:
    """Layers of a Llama in bf16 on one rank, blocks recomputed, times by FLOPs; the head makes its gradients in the
    forward."""
    hidden, ffn, num_blocks, heads, kv_heads, head_size = SHAPES[model]
    tokens = seq_len * sequences
    block = hidden * (heads + 2 * kv_heads) * head_size + heads * head_size * hidden + 3 * hidden * ffn + 2 * hidden
    forward_s = (2 * block + 2 * heads * head_size * seq_len) * tokens / flops
    table = WORDS * hidden

    def layer(numel: int, forward_s: float, backward_s: float) -> Layer:
        part = Part(numel=numel, weight_bytes=2 * numel, slot_dtype=torch.bfloat16)
        return Layer(forward_s=forward_s, backward_s=backward_s, parts=(part,), gathered_bytes=2 * numel)

    blocks = [layer(block, forward_s, 3 * forward_s) for _ in range(num_blocks)]
    return [layer(table, 0, 0), *blocks, layer(table + hidden, 6 * table * tokens / flops, 0)]


def options_of(name: str) -> OffloadOptions:
    """Of the names that benchmarks/one_run.py gives: ``streamed+15~0.6``."""
    tier, _, share = name.partition("~")
    tier, _, gib = tier.partition("+")
    chosen: dict[str, Any] = {"streamed": {"states": "host", "weights": "host"}, "host": {"states": "host"}}.get(
        tier, {"states": "nvme", "nvme_path": ["/drive"]}
    )
    if share:
        chosen |= {"update": "speculate", "speculate_share": float(share)}
    return OffloadOptions(gpu_bytes=int(float(gib or 0) * GIB), **chosen)


def recorded() -> list[dict[str, Any]]:
    """Runs of ours of 2026-11-24, whose steps the model did not see when it was written as it is."""
    rows = [row for report in json.loads((RESULTS / "offload.json").read_text()) for row in report["rows"]]
    return [row for row in rows if row.get("host_bytes_per_param") and "%" not in row["name"]]


def test_the_recorded_steps_are_predicted_within_a_tenth() -> None:
    rates, flops = recorded_rates()
    assert len(recorded()) >= 7
    for row in recorded():
        layers = llama(row["model"], row["seq"], row["batch"], flops)
        found = predict(layers, options_of(row["name"]), rates, micro_batches=row["accumulation"])
        if row["steps_unclipped"]:
            assert found.step_s == pytest.approx(row["step_s"], rel=0.1), row
        if row["clipped_step_s"]:
            assert found.clipped_step_s == pytest.approx(row["clipped_step_s"], rel=0.1), row
        assert found.host_bytes / row["params"] == pytest.approx(row["host_bytes_per_param"], rel=0.02), row


def layers(count: int = 8, numel: int = 10_000_000, forward_s: float = 0.01) -> list[Layer]:
    part = Part(numel=numel, weight_bytes=2 * numel, slot_dtype=torch.bfloat16)
    return [Layer(forward_s=forward_s, backward_s=2 * forward_s, parts=(part,)) for _ in range(count)]


def test_all_on_the_device_takes_what_it_computes() -> None:
    found = predict(layers(), OffloadOptions(), RATES, micro_batches=3)
    assert found.step_s == pytest.approx(3 * 8 * 0.03 + 8e7 / RATES.resident) == found.clipped_step_s
    assert found.bottleneck == COMPUTE and found.host_bytes == found.into_bytes == found.written_bytes == 0


def test_drives_bound_a_step_by_24_bytes_a_parameter() -> None:
    options = OffloadOptions(states="nvme", nvme_path=["/drive"])
    found = predict(layers(), options, RATES, micro_batches=1)
    assert found.written_bytes == pytest.approx(12 * 8e7, rel=1e-3) and found.bottleneck == DRIVE
    assert 24 * 8e7 / 2e9 <= found.step_s < 1.2 * 24 * 8e7 / 2e9 + 0.24
    half = predict(layers(), replace(options, host_bytes=900_000_000), RATES, micro_batches=1)
    assert 0.3 * found.written_bytes < half.written_bytes < 0.7 * found.written_bytes
    assert half.step_s < 0.75 * found.step_s
    with pytest.raises(ValueError, match="rate of the drives"):
        predict(layers(), options, replace(RATES, drive=None), micro_batches=1)


def test_weights_on_drives_cost_ten_bytes_a_parameter_more() -> None:
    """Four in the update, two as the gradient goes, two for each use but the last layer's second."""
    options = OffloadOptions(states="nvme", weights="nvme", nvme_path=["/drive"])
    host = predict(layers(), replace(options, weights="host"), RATES, micro_batches=1)
    found = predict(layers(), options, RATES, micro_batches=1)
    assert found.written_bytes == pytest.approx(16 * 8e7, rel=1e-3)
    assert found.read_bytes == pytest.approx((14 + 2 + 2 * 7 / 8) * 8e7, rel=1e-3)
    assert found.busy_s[DRIVE] == pytest.approx((found.written_bytes + found.read_bytes) / RATES.drive)
    assert found.busy_s[DRIVE] <= found.step_s < 1.1 * found.busy_s[DRIVE] and found.bottleneck == DRIVE
    assert found.into_bytes == host.into_bytes and found.out_bytes == host.out_bytes
    assert found.nvme_bytes == pytest.approx(14 / 12 * host.nvme_bytes, rel=1e-3)
    buffers = Buffers.of([shard for shard in place([p for layer in layers() for p in layer.parts], options) if shard])
    assert found.host_bytes == buffers.size_bytes < host.host_bytes
    several = predict(layers(), options, RATES, micro_batches=5)
    assert several.written_bytes == found.written_bytes
    assert several.read_bytes - found.read_bytes == pytest.approx(4 * (2 + 2 * 7 / 8) * 8e7, rel=1e-3)


def test_drives_that_are_quick_hide_behind_what_the_device_computes() -> None:
    """Weights are asked for ahead, before a gradient that is made meanwhile."""
    options = OffloadOptions(states="nvme", weights="nvme", nvme_path=["/drive"])
    quick = replace(RATES, drive=4.5e9, update=1e10)
    found = predict(layers(forward_s=0.1), options, quick, micro_batches=1)
    assert found.bottleneck == COMPUTE and found.busy_s[DRIVE] == pytest.approx(33.75 * 8e7 / 4.5e9, rel=1e-3)
    first_s = 34e7 / 4.5e9  # of a layer's update, weights and gradient, which nothing hides
    assert found.step_s < 8 * 0.3 + first_s + 0.02


def test_updates_hide_behind_the_forward_and_speculation_behind_the_backward() -> None:
    late = predict(layers(), OffloadOptions(states="host"), RATES, micro_batches=1)
    assert late.bottleneck == HOST and late.step_s > 8 * 0.03 + 0.03
    guessed = predict(
        layers(), OffloadOptions(states="host", update="speculate", speculate_share=0.7), RATES, micro_batches=1
    )
    assert guessed.step_s < late.step_s < guessed.clipped_step_s + 1e-9
    slow = predict(layers(forward_s=0.1), OffloadOptions(states="host"), RATES, micro_batches=1)
    assert slow.bottleneck == COMPUTE and slow.step_s < 1.03 * 8 * 0.3


def test_weights_first_hides_the_states_behind_the_backward_clipped_or_not() -> None:
    rates = replace(RATES, update=5e8, weights=8e8, states=5.4e8)  # of all layers: 160, 100 and 148 ms
    late, first = (
        predict(layers(forward_s=0.0115), OffloadOptions(states="host", update=update), rates, micro_batches=1)
        for update in ("just_in_time", "weights_first")
    )
    assert late.bottleneck == HOST and first.clipped_step_s == first.step_s < 0.87 * late.step_s
    assert first.busy_s[HOST] == pytest.approx(8e7 / 8e8 + 8e7 / 5.4e8)
    slow = replace(rates, states=1e8)  # the next update waits for the states to be made
    options = OffloadOptions(states="host", update="weights_first")
    held = predict(layers(forward_s=0.0115), options, slow, micro_batches=1)
    assert held.bottleneck == HOST and held.step_s == pytest.approx(held.busy_s[HOST], rel=0.1)


def test_more_on_the_device_is_never_slower() -> None:
    times = [
        predict(layers(), OffloadOptions(states="host", gpu_bytes=k * 120_000_000), RATES, micro_batches=1).step_s
        for k in range(9)
    ]
    assert all(after <= before + 1e-3 for before, after in zip(times, times[1:], strict=False)) and times[8] < times[0]


@pytest.mark.parametrize("weights", ["device", "host", "nvme"])
def test_micro_batches_between_are_taken_as_one_another(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    tier = {"states": "nvme", "nvme_path": ["/drive"]} if weights == "nvme" else {"states": "host"}
    options = OffloadOptions(weights=weights, **tier)
    short = predict(layers(forward_s=0.0005), options, RATES, micro_batches=12)
    monkeypatch.setattr(cost, "MICRO_BATCHES", 12)
    whole = predict(layers(forward_s=0.0005), options, RATES, micro_batches=12)
    assert short.step_s == pytest.approx(whole.step_s, rel=1e-6) and short.into_bytes == whole.into_bytes
    assert short.busy_s == pytest.approx(whole.busy_s) and short.read_bytes == whole.read_bytes


def test_an_update_takes_the_cores_that_compute() -> None:
    alone = predict(layers(forward_s=0.1), OffloadOptions(states="host"), RATES, micro_batches=1)
    shared = predict(layers(forward_s=0.1), OffloadOptions(states="host"), replace(RATES, shared=0.5), micro_batches=1)
    assert shared.step_s == pytest.approx(alone.compute_s + 0.5 * 8e7 / RATES.update, rel=0.05)


@pytest.mark.parametrize(("out", "limit"), [(2e10, HOST), (1e8, OUT)])
def test_the_last_gradient_limits_a_step_only_where_its_way_takes_longer_than_its_update(
    out: float, limit: str
) -> None:
    numel = 1_000_000
    part = Part(numel=numel, weight_bytes=2 * numel, slot_dtype=torch.bfloat16)
    alone = [Layer(forward_s=0.002, backward_s=0.004, parts=(part,), gathered_bytes=2 * numel)]
    found = predict(alone, OffloadOptions(states="host"), replace(RATES, out=out), micro_batches=1)
    assert found.bottleneck == limit, str(found)
