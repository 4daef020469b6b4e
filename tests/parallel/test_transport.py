"""Quantized transport: every rank computes with one model, near the exact one, whatever crosses which level how."""

import pytest

from parallel import Mesh, ParallelOptions, Placement
from parallel.quantize import Format
from parallel.transport import Transport
from tests.parallel.test_placements import CUBE, PRESETS, free, run_world

SMALL = {"weights_block": 32, "grads_block": 32}  # the toy's matrices have about 900 elements
GRID = {"node": 2, "gpu": 2}
QUANTIZED = ("outer", "all")
SGD = {"name": "sgd"}


def case(placement: str | dict, **options) -> dict:
    placement = {"placement": placement} if isinstance(placement, str) else placement
    rest = {key: options.pop(key) for key in ("accumulation", "clip", "bf16", "tied", "optimizer") if key in options}
    return {
        "check": "quantized", "levels": GRID, "parallel": placement | SMALL | options, "accumulation": 1,
        "optimizer": SGD,
    } | rest  # fmt: skip


def check(answers: list[dict]) -> None:
    for answer in answers:
        assert answer["one_model"], answer
        assert answer["from_master"] < 0.01, answer  # half a step of 127 in blocks of normal values
        assert answer["difference"] < 0.1 and answer["norms"] < 0.02, answer
        assert answer["alive"] == 0, answer


@pytest.mark.slow
def test_every_placement_trains_one_model_near_the_exact_one() -> None:
    answers = run_world(4, [case(preset, quantize=QUANTIZED[i % len(QUANTIZED)]) for i, preset in enumerate(PRESETS)])
    check(answers)
    assert all(answer["difference"] > 1e-5 for answer in answers), "nothing was quantized"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_matrix(quantize: str, feedback: bool, accumulation: int) -> None:
    """{placements} x {quantization} x {accumulation} x {clipping} x {tied}; frozen, odd and unused ones are in all."""
    cases = [
        case(preset, quantize=quantize, error_feedback=feedback, accumulation=accumulation, clip=clip, tied=tied)
        for preset in PRESETS
        for clip in (0.5, 1e9)
        for tied in (True, False)
    ]
    check(run_world(4, cases))


@pytest.mark.parametrize(
    "triples",
    [
        pytest.param([(0, 1, 2)], id="one"),
        pytest.param([(0, 0, 2), (1, 2, 3), (2, 3, 3), (1, 1, 1)], id="others", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_three_levels_and_free_triples(triples: list[tuple[int, int, int]]) -> None:
    cases = [case(free(*triple), quantize="all", accumulation=2) | {"levels": CUBE} for triple in triples]
    mixed = {"weights_format": {"gpu": "int8"}, "grads_format": {"node": "int4", "die": "int8"}}
    check(run_world(8, [*cases, case(free(2, 2, 3), **mixed) | {"levels": CUBE}]))


@pytest.mark.slow
def test_three_workers_and_formats_by_level() -> None:
    check(run_world(3, [case(preset, quantize="all") | {"levels": {}} for preset in ("zero1", "zero3", "ddp")]))
    cases = [
        case("zero3", weights_format={"gpu": "int8"}),
        case("zero3", weights_format={"node": "int8"}, grads_format={"gpu": "int8"}, grads_block=64),
        case("zero3", quantize="all", overlap=False, prefetch_units=2),
        case("hsdp", quantize="all", bf16=True),
        case("topo", quantize="outer", exact=["head.*", "blocks.0.up.*"]),
    ]
    answers = run_world(4, cases)
    check(answers)
    assert "blocks.0.up.weight" in answers[-1]["exact"] and "blocks.0.down.weight" not in answers[-1]["exact"]


def test_parameters_of_fewer_than_two_dimensions_and_frozen_ones_are_exact() -> None:
    [answer] = run_world(4, [case("zero3", quantize="all")])
    exact = [n for n in answer["names"] if n.endswith(("bias", "norm.weight", "gain")) or n == "offset"]
    frozen = [n for n in answer["names"] if n.startswith("blocks.2.") or n == "blocks.1.up.weight"]
    assert sorted(answer["exact"]) == sorted({*exact, *frozen})


@pytest.mark.slow
@pytest.mark.parametrize("presets", [pytest.param(("topo",), id="topo"), pytest.param(("zero3", "ddp"), id="others")])
def test_training_resumes_to_the_last_bit_with_error_feedback_too(presets: tuple[str, ...]) -> None:
    base = {"check": "resumed", "levels": GRID, "accumulation": 2, "then": {}}
    cases = [
        base | {"parallel": {"placement": preset, "quantize": "all", "error_feedback": True} | SMALL, "bf16": bf16}
        for preset in presets
        for bf16 in ((False, True) if len(presets) > 1 else (False,))
    ]
    answers = run_world(4, cases)
    assert all(answer["bitwise"] for answer in answers), answers


@pytest.mark.slow
def test_error_feedback_brings_sgd_nearer() -> None:
    """What is left out comes later: over twenty steps of plain SGD the errors do not add up."""
    sgd = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    grads = {"grads_format": {"node": "int4", "gpu": "int4"}, "optimizer": sgd, "clip": 1e9}
    without, with_it = run_world(4, [case("zero2", **grads), case("zero2", **grads, error_feedback=True)])
    assert with_it["residuals"] > 0 == without["residuals"]
    assert with_it["difference"] < 0.6 * without["difference"], (with_it, without)


def transport(placement: str, levels: dict, **options) -> Transport:
    mesh, chosen = Mesh(levels), ParallelOptions(placement=placement, **options)
    return Transport.of(chosen, mesh, Placement.of(chosen, mesh.num_levels))


def test_quantize_names_levels_that_have_several_members() -> None:
    found = transport("zero3", {"rack": 1, "node": 2, "gpu": 4}, quantize="outer")
    assert found.weights == (None, Format(8, 256), None)
    assert found.grads == (None, Format(4, 128), None)
    assert not transport("zero3", {"node": 1, "gpu": 1}, quantize="all").quantizes
    assert transport("zero3", GRID, quantize="all", grads_format={"gpu": "exact"}).grads == (Format(4, 128), None)


def test_levels_that_are_not_there_or_not_crossed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.grads_format names nod; the levels are node, gpu"):
        transport("zero3", GRID, grads_format={"nod": "int4"})
    with pytest.raises(ValueError, match=r"parallel.weights_format.node is set, but no weights cross node"):
        transport("hsdp", GRID, weights_format={"node": "int8"})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantize": "outter"}, "parallel.quantize='outter': choose one of none, outer, all"),
        ({"weights_format": {"node": "int4"}}, "parallel.weights_format.node='int4': choose one of exact, int8"),
        ({"grads_format": {"node": "fp8"}}, "parallel.grads_format.node='fp8': choose one of exact, int8, int4"),
        ({"quantize": "all", "grads_block": 100}, "parallel.grads_block=100: choose a power of two from 32 to 4096"),
        ({"error_feedback": True}, "set parallel.quantize or"),
    ],
)
def test_bad_options(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ParallelOptions(**options)
