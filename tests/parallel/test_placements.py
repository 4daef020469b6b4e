"""Every placement trains as one plain process does. The conformance suite of the engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRESETS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "hfsdp", "topo")
HERE = Path(__file__).parent


def run_world(world: int, cases: list[dict], script: str = "worlds.py") -> list[dict]:
    """The answers of the script to the cases, in their order."""
    done = subprocess.run(
        [sys.executable, HERE / script, str(world)], input=json.dumps(cases), capture_output=True, text=True,
        timeout=280, cwd=HERE.parent.parent, env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def free(params: int, grads: int, optim: int) -> dict:
    return {"placement": "free", "params": params, "grads": grads, "optim": optim}


def presets(levels: dict, accumulations: tuple[int, ...] = (1, 4), **options) -> list[dict]:
    return [
        {"levels": levels, "parallel": {"placement": preset} | options, "accumulation": accumulation}
        for preset in PRESETS
        for accumulation in accumulations
    ]


CUBE = {"node": 2, "gpu": 2, "die": 2}
WORLDS = {2: presets({}, (1,)), 4: presets({"node": 2, "gpu": 2}, (4,))}
THOROUGH = {
    2: presets({}, (4,)),
    3: presets({}),
    4: presets({}, (4,))
    + presets({"node": 2, "gpu": 2}, (1,))
    + presets({"node": 2, "gpu": 2}, (2,), overlap=False)
    + presets({"node": 2, "gpu": 2}, (2,), prefetch_units=0)
    + presets({"node": 2, "gpu": 2}, (2,), prefetch_units=3),
    8: presets(CUBE)
    + presets({"node": 4, "gpu": 2}, (1,))
    + [
        {"levels": CUBE, "parallel": free(*triple), "accumulation": 2}
        for triple in ((0, 1, 2), (0, 0, 2), (1, 1, 2), (1, 3, 3), (2, 3, 3), (0, 1, 1), (1, 2, 2))
    ],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        *(pytest.param(w, cases, id=str(w), marks=[pytest.mark.slow] if w == 4 else []) for w, cases in WORLDS.items()),
        *(pytest.param(w, cases, id=f"{w}-thorough", marks=pytest.mark.slow) for w, cases in THOROUGH.items()),
    ],
)
def test_parameters_equal_those_of_one_process(world: int, cases: list[dict]) -> None:
    answers = run_world(world, cases)
    assert len(answers) == len(cases)
    far = [a for a in answers if not (a["difference"] < 1e-6 and a["norms"] < 1e-6)]
    assert not far, far
    assert all(a["alive"] == 0 for a in answers), "gathered weights were left over"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("overlap", [True, False])
def test_matrix(accumulation: int, overlap: bool) -> None:
    """{placements} x {accumulation} x {overlap} x {clipping} x {tied}, as `test_transport.test_matrix` does quantized;
    frozen, odd and unused parameters are in all."""
    cases = [
        case | {"clip": clip, "tied": tied}
        for case in presets({"node": 2, "gpu": 2}, (accumulation,), overlap=overlap)
        for clip in (0.5, 1e9)
        for tied in (True, False)
    ]
    far = [a for a in run_world(4, cases) if not (a["difference"] < 1e-6 and a["norms"] < 1e-6)]
    assert not far, far


def test_parameters_equal_those_of_ddp() -> None:
    cases = [{"check": "ddp", "parallel": {"placement": placement}} for placement in ("ddp", "zero2", "zero3")]
    far = [a for a in run_world(2, cases) if not a["difference"] < 1e-6]
    assert not far, far


def test_parameters_without_elements_and_buffers_with_strides() -> None:
    zero3 = {"placement": "zero3", "prefetch_units": 2}
    quantized = {"quantize": "all", "weights_block": 32, "grads_block": 32}
    cases = [{"parallel": zero3, "empty": True}, {"parallel": zero3, "strides": True}]
    answers = run_world(2, [*cases, {"parallel": zero3 | quantized, "empty": True, "tied": False}])
    assert [a for a in answers[:2] if a["difference"] < 1e-6] == answers[:2]
    assert answers[2]["difference"] < 0.2


@pytest.mark.slow
def test_variants_equal_one_process() -> None:
    """Untied, recomputed, compiled, no clipping, prefetching more or nothing, evaluation in between, SGD."""
    base = {"parallel": {"placement": "zero3"}, "accumulation": 2}
    cases = [
        base | {"tied": False},
        base | {"recompute": True},
        base | {"tied": False, "compile": True},
        base | {"tied": False, "compile": True, "recompute": True},
        base | {"clip": 1e9},
        base | {"evaluate": True},
        base | {"parallel": {"placement": "zero3", "prefetch_units": 0}},
        base | {"parallel": {"placement": "zero3", "prefetch_units": 3}},
        base | {"parallel": {"placement": "zero3", "overlap": False}},
        base | {"parallel": {"placement": "zero2", "overlap": False}},
        base | {"optimizer": {"name": "sgd", "weight_decay": 0.0}},
        base | {"optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.01}},
    ]
    far = [a for a in run_world(2, cases) if not (a["difference"] < 1e-6 and a["norms"] < 1e-6)]
    assert not far, far


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_more_units_are_gathered_than_prefetch_units_and_one(recompute: bool) -> None:
    base = {"accumulation": 2, "recompute": recompute, "tied": False}
    quantized = {"quantize": "all", "weights_block": 32, "grads_block": 32}
    cases = [
        base | {"parallel": {"placement": "zero3", "prefetch_units": count} | more}
        for more in ({}, quantized)
        for count in (0, 1, 2)
    ]
    assert [answer["most_alive"] for answer in run_world(2, cases)] == [1, 2, 3] * 2


@pytest.mark.slow
def test_bf16_stays_near_fp32() -> None:
    cases = [
        {"parallel": {"placement": placement, "reduce_dtype": dtype}, "accumulation": accumulation, "bf16": True}
        for placement in ("ddp", "zero1", "zero3")
        for dtype in ("fp32", "bf16")
        for accumulation in (1, 2)
    ]
    for answer in run_world(2, cases):
        assert 1e-6 < answer["difference"] < 0.2, answer
        assert answer["norms"] < 0.1, answer


@pytest.mark.slow
def test_state_moves_between_placements() -> None:
    """The second half of a training under another placement; under the same one it is equal to the last bit."""
    base = {"check": "resumed", "levels": {"node": 2, "gpu": 2}, "parallel": {"placement": "topo"}, "accumulation": 2}
    cases = [
        *[base | {"then": {}}] * 2,  # again and again: what a race spoils, it spoils now and then
        base | {"then": {"parallel": {"placement": "ddp"}}},
        base | {"then": {"levels": {}, "parallel": {"placement": "zero3"}}},
        base | {"bf16": True, "then": {}},
    ]
    answers = run_world(4, cases)
    assert all(a["bitwise"] for a in answers if a["case"]["then"] == {}), answers
    assert all(a["difference"] < 1e-5 for a in answers), answers


@pytest.mark.slow
def test_memory_is_what_the_placement_says() -> None:
    levels = {"node": 2, "gpu": 2}
    cases = [{"levels": levels, "parallel": {"placement": p}} for p in ("ddp", "zero3", "hsdp", "hfsdp")]
    ddp, zero3, hsdp, hfsdp = (a["state_bytes"] for a in run_world(4, cases))
    assert ddp["parameters"] == 4 * zero3["parameters"] == 2 * hsdp["parameters"] == 2 * hfsdp["parameters"]
    assert ddp["optimizer"] == 4 * zero3["optimizer"] == 2 * hsdp["optimizer"] == 4 * hfsdp["optimizer"]
    assert ddp["buffers"] == 0 < zero3["buffers"]
