"""State that is away from the device trains as state on it does, under every placement."""

import pytest
import torch
from torch import nn

from offload.options import OffloadOptions
from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard
from tests.parallel.test_placements import PRESETS, free, run_world

HOST = {"states": "host", "threads": 1}
STREAMED = HOST | {"weights": "host"}
SPECULATE = HOST | {"update": "speculate", "speculate_share": 1.0}
FIRST = HOST | {"update": "weights_first"}
HALF = SPECULATE | {"speculate_share": 0.5, "weights": "host"}
WEIGHTS = {"weights": "nvme"}
SPLIT = HOST | {"gpu_bytes": 20_000}
ALL_ON_DEVICE = HOST | {"gpu_bytes": 1_000_000}


@pytest.fixture(scope="module")
def nvme(tmp_path_factory) -> dict:
    """States on a drive, half of them in host memory."""
    folder = tmp_path_factory.mktemp("drive")
    return {"states": "nvme", "nvme_path": [str(folder)], "nvme_direct": False, "threads": 1}


def check(world: int, cases: list[dict], tolerance: float = 1e-6) -> None:
    for answer in run_world(world, cases):
        assert answer["difference"] < tolerance, answer
        assert answer["norms"] < tolerance, answer
        assert answer["alive"] == 0 or answer["case"]["parallel"]["placement"] != "zero3", answer


@pytest.mark.timeout(200)
def test_one_worker_equals_a_plain_process(nvme: dict) -> None:
    cases = [
        {"parallel": {"placement": "zero3"}, "accumulation": accumulation, "offload": offload, "evaluate": True}
        for accumulation in (1, 4)
        for offload in (
            HOST,
            STREAMED,
            SPLIT,
            ALL_ON_DEVICE,
            SPLIT | STREAMED,
            nvme,
            nvme | {"weights": "host", "host_bytes": 150_000},
            nvme | WEIGHTS,
            nvme | WEIGHTS | {"gpu_bytes": 12_000, "host_bytes": 180_000},
        )
    ]
    check(1, cases)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_weights_on_drives_equal_a_plain_process_where_a_slot_is_the_shard(nvme: dict) -> None:
    """Ranks that share sequences of collectives, replicas, gradients quantized or not, prefetching much or nothing."""
    weights = nvme | WEIGHTS
    zero3, hsdp, free1 = {"placement": "zero3"}, {"placement": "hsdp"}, free(1, 1, 1)
    cases = [
        {"parallel": zero3, "accumulation": 2, "offload": weights},
        {"parallel": zero3, "accumulation": 2, "offload": weights | {"host_bytes": 125_000}, "evaluate": True},
        {"parallel": zero3 | {"prefetch_units": 0}, "offload": weights},
        {"parallel": zero3 | {"prefetch_units": 3}, "offload": weights, "recompute": True},
        {"parallel": zero3 | {"overlap": False}, "offload": weights},
        {"parallel": {"placement": "ddp"}, "offload": weights},
        {"parallel": hsdp, "levels": {"node": 2, "gpu": 1}, "accumulation": 2, "offload": weights},
        {"parallel": free1, "levels": {"node": 1, "gpu": 2}, "offload": weights | {"gpu_bytes": 10_000}},
    ]
    check(2, cases)
    grads = {"check": "alike", "levels": {"node": 2}, "parallel": zero3 | {"grads_format": {"node": "int4"}}}
    (answer,) = run_world(2, [grads | {"offloads": [STREAMED, weights, weights | {"host_bytes": 125_000}]}])
    assert answer["different"] == [], answer


@pytest.mark.timeout(200)
def test_every_placement_equals_a_plain_process(nvme: dict) -> None:
    levels = {"node": 2, "gpu": 2}
    cases = [
        {"levels": levels, "parallel": {"placement": preset}, "accumulation": 2, "offload": offload}
        for preset, offload in [
            *zip(PRESETS, (HOST, STREAMED, SPECULATE, HALF, nvme, SPECULATE, STREAMED), strict=True),
            ("zero3", FIRST | STREAMED),
            ("topo", FIRST),
        ]
    ]
    cases.append({"levels": levels, "parallel": free(0, 1, 2), "offload": STREAMED | {"gpu_bytes": 5_000}})
    check(4, cases)


@pytest.mark.timeout(100)
def test_where_states_are_changes_no_bit(nvme: dict) -> None:
    offloads = [
        HOST,
        STREAMED,
        FIRST,
        FIRST | STREAMED,
        SPECULATE,
        HALF,
        HALF | {"speculate_share": 1.0},
        nvme,
        nvme | {"weights": "host"},
        nvme | {"host_bytes": 125_000},
        nvme | WEIGHTS,
        nvme | WEIGHTS | {"host_bytes": 180_000, "update": "speculate", "speculate_share": 1.0},
    ]
    cases = [
        {
            "check": "alike",
            "parallel": {"placement": "zero3"},
            "offloads": offloads,
            "bf16": bf16,
            "accumulation": count,
        }
        for bf16, count in ((False, 1), (True, 4))
    ]
    for answer in run_world(1, cases):
        assert answer["different"] == [], answer


def check_skipping(nvme: dict, world: int, levels: dict, placements: tuple[str, ...], offloads: list[dict]) -> None:
    cases = [
        {"check": "skipping", "levels": levels, "parallel": {"placement": placement}, "offload": offload}
        | {"bf16": bool(number % 2), "accumulation": 1 + number % 2}
        for placement in placements
        for number, offload in enumerate(offloads)
    ]
    for answer in run_world(world, cases):
        assert answer["different"] == [] and answer["finite"] and answer["updates"] == 17, answer


def test_a_step_that_is_not_accepted_leaves_no_trace(nvme: dict) -> None:
    check_skipping(
        nvme, 1, {}, ("zero3",), [{}, STREAMED, FIRST, SPECULATE, nvme | {"weights": "host"}, nvme | WEIGHTS]
    )


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_no_rank_keeps_a_trace_of_a_step_that_is_not_accepted(nvme: dict) -> None:
    offloads = [{}, HOST, SPECULATE, HALF, nvme, STREAMED]
    check_skipping(nvme, 4, {"node": 2, "gpu": 2}, ("topo",), offloads)
    check_skipping(nvme, 2, {}, ("zero2",), [HALF, {}])
    check_skipping(nvme, 2, {}, ("zero3",), [nvme | WEIGHTS, nvme | WEIGHTS | {"host_bytes": 125_000}])


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "placements", [pytest.param(("zero2",), id="zero2"), pytest.param(("zero3", "zero1"), marks=pytest.mark.slow)]
)
def test_quantized_transport_of_offloaded_weights_is_that_of_others(placements: tuple[str, ...]) -> None:
    """What is speculated among them: its weights are packed from the slot, so they must be there."""
    cases = [
        {"check": "alike", "levels": {"node": 2}, "parallel": {"placement": placement, "quantize": "all"},
         "offloads": [HOST, STREAMED, SPECULATE, HALF, FIRST], "clip": clip, "bf16": bf16}
        for placement in placements
        for clip, bf16 in ((1e9, False), (0.5, True))
    ]  # fmt: skip
    for answer in run_world(2, cases):
        assert answer["different"] == [], answer


@pytest.mark.timeout(100)
def test_state_moves_between_tiers(nvme: dict) -> None:
    cases = [
        {"check": "resumed", "parallel": {"placement": "zero3"}, "offload": first, "then": {"offload": then}}
        for first, then in (
            (HOST, nvme),
            (nvme, STREAMED),
            (STREAMED, HOST),
            (nvme | WEIGHTS, HOST),
            (nvme, nvme | WEIGHTS),
            (HOST, FIRST),
            (FIRST | STREAMED, HOST),
        )
    ]
    for answer in run_world(1, cases):
        assert answer["bitwise"], answer


def check_snapshots(world: int, levels: dict, cases: list[tuple[str, dict, str]]) -> list[dict]:
    """By placement, offload, and how often a snapshot is taken."""
    found = [
        {"check": "snapshots", "levels": levels, "parallel": {"placement": placement}, "offload": offload}
        | {"every": every, "bf16": bool(number % 2)}
        for number, (placement, offload, every) in enumerate(cases)
    ]
    answers = run_world(world, found, "snapshots_world.py")
    for answer in answers:
        assert answer["different"] == [] and answer["error"] is None, answer
        assert answer["read"] and all(read == newest for read, newest in answer["read"]), answer
    return answers


@pytest.mark.timeout(100)
@pytest.mark.slow
def test_what_is_updated_into_snapshots_is_what_it_is_elsewhere_and_stays(nvme: dict) -> None:
    half = nvme | {"host_bytes": 125_000}
    offloads = [
        (HOST, "3"),
        (STREAMED, "1"),
        (HALF, "2"),
        (SPLIT, "1"),
        (half, "3"),
        (nvme, "1"),
        (nvme | WEIGHTS, "2"),
        (FIRST, "1"),
        (FIRST | STREAMED, "3"),
    ]
    answers = check_snapshots(1, {}, [("zero3", offload, every) for offload, every in offloads])
    copied = [answer["copied"] / answer["state_bytes"] for answer in answers]
    assert max(copied[:2]) < 0.2 and copied[4] < 0.9 < copied[5], copied  # what is frozen is on the device


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_what_several_ranks_update_into_snapshots(nvme: dict) -> None:
    """hsdp, ddp: states that ranks share are copied, each a part."""
    cases = [("zero3", HOST, "1"), ("hsdp", HOST, "1"), ("ddp", STREAMED, "2"), ("topo", SPLIT, "1")]
    check_snapshots(2, {}, [*cases, ("zero1", HALF, "3"), ("topo", FIRST, "1")])
    check_snapshots(4, {"node": 2, "gpu": 2}, [*cases, ("hfsdp", STREAMED, "1")])


@pytest.mark.parametrize(
    ("offload", "said"),
    [
        (SPECULATE, ""),
        (SPECULATE | {"speculate_share": 0.1}, "nothing is speculated on"),
        (FIRST, ""),
        (FIRST | {"gpu_bytes": 1_000_000}, "all is updated just in time"),
    ],
)
def test_that_a_way_of_updating_comes_to_nothing_is_told(offload: dict, said: str) -> None:
    model, told, options = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), [], ParallelOptions()
    engine = shard(
        model, Mesh({"worker": 1}), Placement.of(options, 1), units=list(model), optimizer=OptimizerOptions(),
        initial=lambda name, kind, start, stop: torch.zeros(stop - start), options=options,
        dtype=torch.float32, device=torch.device("cpu"), say=told.append, offload=OffloadOptions(**offload),
    )  # fmt: skip
    engine.close()
    assert bool(told) == bool(said) and all(said in text for text in told)
