"""What lives where: the rule that the engine follows, and what ``offload.states=auto`` makes of it."""

import random
from dataclasses import replace

import pytest
import torch

from offload.choose import HEADROOM, MemoryBudget, choose, device_bytes
from offload.cost import Layer, Rates
from offload.options import ActivationOptions, OffloadOptions
from offload.placing import Part, place
from offload.shard import host_bytes

RATES = Rates(update=3e8, pingpong=4e8, weights=5e8, states=3e8, resident=5e10, into=2e10, out=2e10, drive=2e9)
AUTO = OffloadOptions(states="auto", nvme_path=["/drive"])
PARTS = [Part(numel=10_000_000, weight_bytes=20_000_000, slot_dtype=torch.bfloat16) for _ in range(8)]
LAYERS = [Layer(forward_s=0.01, backward_s=0.03, parts=(part,), gathered_bytes=20_000_000) for part in PARTS]
ACTIVATIONS, EVERYTHING = 1e8, 8 * 160_000_000 + 20_000_000 + 1e8  # 16 bytes a parameter, and a layer's gradients


def test_the_first_stay_and_the_last_are_speculated_on() -> None:
    options = OffloadOptions(states="host", gpu_bytes=250_000_000, update="speculate", speculate_share=0.5)
    placed = place(PARTS, options)
    assert [shard is None for shard in placed] == [True] * 2 + [False] * 6
    assert [shard.pingpong for shard in placed if shard] == [False] * 3 + [True] * 3
    assert place(PARTS, OffloadOptions()) == [None] * 8


def test_host_memory_is_filled_before_the_drives() -> None:
    options = OffloadOptions(states="nvme", nvme_path=["/drive"], host_bytes=900_000_000)
    placed = [shard for shard in place(PARTS, options) if shard]
    on_nvme = [shard.on_nvme for shard in placed]
    assert on_nvme == sorted(on_nvme) and 0 < sum(on_nvme) < 8
    assert 900_000_000 - 125_000_000 < host_bytes(placed) <= 900_000_000
    assert all(shard.on_nvme for shard in place(PARTS, replace(options, host_bytes=None)) if shard)


def test_nothing_is_there_twice_while_something_is_on_drives() -> None:
    options = OffloadOptions(states="nvme", nvme_path=["/drive"], update="speculate", speculate_share=1.0)
    found = []
    for limit in range(900_000_000, 2_600_000_000, 50_000_000):
        placed = [shard for shard in place(PARTS, replace(options, host_bytes=limit)) if shard]
        found.append((sum(shard.on_nvme for shard in placed), sum(shard.pingpong for shard in placed)))
        assert not any(drives and twice for drives, twice in found)
    assert {(1, 0), (0, 1), (0, 8)} <= set(found)
    assert [drives for drives, _ in found] == sorted((drives for drives, _ in found), reverse=True)


@pytest.mark.parametrize("weights", ["device", "host", "nvme"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_is_there_twice_does_not_fill_host_memory_over_its_limit(weights: str, share: float) -> None:
    """With the buffers for weights on their way to the device."""
    for limit in range(600_000_000, 2_600_000_000, 50_000_000):
        options = OffloadOptions(
            states="nvme", nvme_path=["/drive"], weights=weights, host_bytes=limit, update="speculate",
            speculate_share=share,
        )  # fmt: skip
        assert host_bytes([shard for shard in place(PARTS, options) if shard]) <= limit


def test_what_fits_stays_on_the_device() -> None:
    room = MemoryBudget(device_bytes=EVERYTHING / HEADROOM + 1, host_bytes=1e12)
    found = choose(LAYERS, AUTO, RATES, room, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert found.options.states == "none" and found.device_bytes <= EVERYTHING


@pytest.mark.parametrize("gib", [0.45, 0.7, 1.0])
def test_the_device_is_filled_and_no_more(gib: float) -> None:
    room = MemoryBudget(device_bytes=gib * 2**30, host_bytes=1e12, nvme_bytes=1e12)
    found = choose(LAYERS, AUTO, RATES, room, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert found.options.states == "host" and found.prediction.written_bytes == 0
    needed = device_bytes(LAYERS, found.options, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert needed == found.device_bytes <= HEADROOM * room.device_bytes
    more = replace(found.options, gpu_bytes=found.options.gpu_bytes + 140_000_000)
    more_needed = device_bytes(LAYERS, more, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert more_needed > HEADROOM * room.device_bytes
    assert "offload.states=host" in found.why and "states=nvme takes" in found.why


def test_speculation_where_it_pays_and_there_is_room() -> None:
    small = MemoryBudget(device_bytes=0.45 * 2**30, host_bytes=1.3e9)
    large = replace(small, host_bytes=1e12)
    frugal = choose(LAYERS, AUTO, RATES, small, micro_batches=1, activation_bytes=ACTIVATIONS)
    quick = choose(LAYERS, AUTO, RATES, large, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert quick.options.update == "speculate" and quick.prediction.step_s < frugal.prediction.step_s
    assert frugal.prediction.host_bytes <= 1.3e9 < quick.prediction.host_bytes


def test_drives_take_what_host_memory_cannot() -> None:
    room = MemoryBudget(device_bytes=0.45 * 2**30, host_bytes=9e8, nvme_bytes=1e12)
    found = choose(LAYERS, AUTO, RATES, room, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert found.options.states == "nvme" and found.options.host_bytes == 9e8
    assert 0 < found.prediction.nvme_bytes < 12 * 8e7 and found.prediction.host_bytes <= 9e8


def test_weights_go_to_drives_where_host_memory_does_not_hold_them() -> None:
    """Of large units, beside which what passes through is little; never where the slots' owners are others."""
    part = replace(PARTS[0], numel=200_000_000, weight_bytes=400_000_000)
    large = [replace(LAYERS[0], parts=(part,), gathered_bytes=400_000_000) for _ in range(40)]
    room = MemoryBudget(device_bytes=4 * 2**30, host_bytes=17e9, nvme_bytes=1e12)
    host = choose(large, AUTO, RATES, room, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert host.options.states == "nvme" and host.options.weights == "host"
    short = replace(room, host_bytes=4e9)
    found = choose(large, AUTO, RATES, short, micro_batches=1, activation_bytes=ACTIVATIONS)
    assert found.options.weights == "nvme" and "offload.weights=nvme" in found.why
    assert found.prediction.host_bytes <= 4e9 and found.prediction.step_s > host.prediction.step_s
    apart = [replace(layer, parts=(replace(part, slot_is_shard=False),)) for layer in large]
    with pytest.raises(ValueError, match="nothing fits"):
        choose(apart, AUTO, RATES, short, micro_batches=1, activation_bytes=ACTIVATIONS)


def test_weights_that_cannot_be_on_drives_are_refused_where_shards_are_placed() -> None:
    options = OffloadOptions(states="nvme", weights="nvme", nvme_path=["/drive"])
    with pytest.raises(ValueError, match="offload.weights=nvme: .*parallel=zero3, hsdp or ddp"):
        place([*PARTS, replace(PARTS[0], slot_is_shard=False)], options)
    for states in ("none", "host"):
        with pytest.raises(ValueError, match="offload.weights=nvme needs offload.states=nvme"):
            OffloadOptions(states=states, weights="nvme")


def test_slots_come_to_host_memory_with_their_states() -> None:
    options = OffloadOptions(states="nvme", weights="nvme", nvme_path=["/drive"], host_bytes=900_000_000)
    placed = [shard for shard in place(PARTS, options) if shard]
    here = [shard for shard in placed if not shard.on_nvme]
    assert 0 < len(here) < 8 and placed[: len(here)] == here and not any(shard.slot_on_nvme for shard in here)
    assert all(shard.host_bytes == 0 and shard.slot_bytes >= 2 * shard.numel for shard in placed[len(here) :])
    assert 900_000_000 - 145_000_000 < host_bytes(placed) <= 900_000_000


def test_nothing_fits_is_one_error_that_says_what_is_missing() -> None:
    room = MemoryBudget(device_bytes=0.4 * 2**30, host_bytes=1e8, nvme_bytes=1e9)
    with pytest.raises(ValueError, match=r"nothing fits.*states=none needs 1\.\d+ GiB on the dev.*offload\.nvme_path"):
        choose(LAYERS, AUTO, RATES, room, micro_batches=1, activation_bytes=ACTIVATIONS)


def test_accumulated_gradients_are_kept_in_fp32() -> None:
    options = OffloadOptions(states="host", weights="host")
    one, many = (device_bytes(LAYERS, options, micro_batches=n, activation_bytes=0.0) for n in (1, 4))
    assert many - one == 4 * 8e7


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gpu_bytes", [0, 300_000_000, 10**10])
def test_the_peak_is_that_of_a_step_played_layer_by_layer(seed: int, gpu_bytes: int) -> None:
    """What blocks hold goes as the gradients of those that stay come."""
    draw = random.Random(seed)
    layers = [replace(layer, held_bytes=draw.randrange(10**8)) for layer in LAYERS]
    options = OffloadOptions(states="host", gpu_bytes=gpu_bytes)
    stays = [2 * part.numel if shard is None else 0 for part, shard in zip(PARTS, place(PARTS, options), strict=True)]
    now = most = stays[0]  # the root's
    for layer in layers:
        now += layer.held_bytes
        most = max(most, now)
    for number in reversed(range(len(layers))):
        now += (stays[number] if number else 0) - layers[number].held_bytes
        most = max(most, now)
    found, bare = (
        device_bytes(given, options, micro_batches=1, activation_bytes=0.0)
        for given in (layers, [replace(layer, held_bytes=0) for layer in layers])
    )
    assert found - bare == most - sum(stays)


@pytest.mark.parametrize("ignored", [{"gpu_bytes": 1}, {"weights": "host"}, {"predict": False}])
def test_auto_refuses_what_it_would_ignore(ignored: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"offload\.\w+=.*offload\.states=auto"):
        OffloadOptions(states="auto", **ignored)
    with pytest.raises(
        ValueError, match="offload.device_bytes=5 is what offload.states=auto and offload.activations=auto"
    ):
        OffloadOptions(states="host", device_bytes=5)
    auto = OffloadOptions(states="host", device_bytes=5, activations=ActivationOptions(mode="auto"))
    assert auto.with_activations(ActivationOptions(mode="stream")).device_bytes is None
    assert auto.with_activations(auto.activations) == auto
