"""FSDP2 trains the same job as plain PyTorch, and its state goes out and in by ranges."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offload.state import filling
from parallel.fsdp2 import FSDP2Engine
from parallel.options import OptimizerOptions, ParallelOptions
from tests.parallel import reference_job as job

STEPS = 6
SGD = OptimizerOptions(name="sgd", lr=job.ADAMW.lr, momentum=0.9)
CASES = {
    "zero3": (ParallelOptions(placement="zero3"), job.ADAMW),
    "zero2": (ParallelOptions(placement="zero2", prefetch_units=2), job.ADAMW),
    "ddp": (ParallelOptions(placement="ddp"), job.ADAMW),
    "hsdp": (ParallelOptions(placement="hsdp", levels={"node": 2, "gpu": 1}), job.ADAMW),
    "sgd": (ParallelOptions(placement="zero3"), SGD),
}


def build(parallel: ParallelOptions, optimizer: OptimizerOptions, **changes: Any) -> FSDP2Engine:
    model = job.awkward_on_meta()
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "initial": job.initial, **changes}
    if options.pop("recomputed", False):
        options["recompute"] = list(model.blocks)
    return FSDP2Engine(model, units=model.units(), optimizer=optimizer, options=parallel, **options)


def train_and_resume(rank: int, cases: dict[str, tuple[ParallelOptions, OptimizerOptions]]) -> dict[str, Any]:
    """Train; once more with the state taken out half way, loaded into a new engine, and continued."""
    results: dict[str, Any] = {}
    for name, (parallel, optimizer) in cases.items():
        engine = build(parallel, optimizer, recomputed=name == "zero2")
        result = job.train(engine, range(STEPS // 2))
        saved = job.gather_state(engine)
        rest = job.train(engine, range(STEPS // 2, STEPS))
        other = build(parallel, optimizer)
        other.load(filling(job.reader(saved)), moments=True)
        other.updates = STEPS // 2
        results[name] = {
            "losses": torch.cat([result["losses"], rest["losses"]]),
            "norms": torch.cat([result["norms"], rest["norms"]]),
            "state": job.gather_state(engine),
            "rest": rest,
            "resumed": job.train(other, range(STEPS // 2, STEPS)),
            "resumed_state": job.gather_state(other),
            "bytes": engine.state_bytes(),
        }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return job.spawn(train_and_resume, 2, tmp_path_factory.mktemp("fsdp2"), CASES)


def assert_equals_plain(result: dict[str, Any], world: int, optimizer: OptimizerOptions) -> None:
    plain = job.train_plainly(world, STEPS, optimizer)
    torch.testing.assert_close(result["losses"], plain["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(result["norms"], plain["norms"], rtol=1e-5, atol=0)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(result["state"][name, "master"].view_as(weight), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_pytorch(results: list[dict[str, Any]], case: str) -> None:
    assert_equals_plain(results[0][case], 2, CASES[case][1])


@pytest.mark.slow
def test_hybrid_sharding_over_two_levels_equals_plain_pytorch(tmp_path: Path) -> None:
    parallel = ParallelOptions(placement="hsdp", levels={"node": 2, "gpu": 2})
    results = job.spawn(train_and_resume, 4, tmp_path, {"hsdp": (parallel, job.ADAMW)})
    assert_equals_plain(results[0]["hsdp"], 4, job.ADAMW)


@pytest.mark.parametrize("case", CASES)
def test_continues_identically_from_its_pieces(results: list[dict[str, Any]], case: str) -> None:
    result = results[0][case]
    torch.testing.assert_close(result["resumed"], result["rest"], rtol=0, atol=0)
    torch.testing.assert_close(result["resumed_state"], result["state"], rtol=0, atol=0)


def skip_a_step(rank: int, cases: dict[str, tuple[ParallelOptions, OptimizerOptions]]) -> dict[str, Any]:
    """By case, the state after steps 0 and 2, with step 1 refused in between and without it."""
    results = {}
    for name, (parallel, optimizer) in cases.items():
        skipping, without = build(parallel, optimizer), build(parallel, optimizer)
        for step in range(3):
            job.train(skipping, [step], lambda norm, step=step: step != 1)
        job.train(without, [0, 2])
        assert skipping.updates == without.updates == 2
        results[name] = job.gather_state(skipping), job.gather_state(without)
    return results


@pytest.mark.slow
def test_a_step_that_is_not_accepted_leaves_no_trace(tmp_path: Path) -> None:
    for results in job.spawn(skip_a_step, 2, tmp_path, CASES):
        for skipping, without in results.values():
            torch.testing.assert_close(skipping, without, rtol=0, atol=0)


def test_state_is_divided_between_the_ranks(results: list[dict[str, Any]]) -> None:
    numel = sum(param.numel() for param in job.awkward_on_meta().parameters())
    held = [rank["zero3"]["bytes"] for rank in results]
    assert sum(each["master"] for each in held) == 4 * numel
    assert max(each["master"] for each in held) < 4 * 0.7 * numel


def test_bf16_keeps_fp32_masters(tmp_path: Path) -> None:
    (result,) = job.spawn(train_in_bf16, 1, tmp_path)
    assert result["dtypes"] == {torch.float32}
    plain = job.train_plainly(1, STEPS, job.ADAMW)
    torch.testing.assert_close(result["losses"], plain["losses"], rtol=3e-2, atol=0)


def train_in_bf16(rank: int) -> dict[str, Any]:
    engine = build(ParallelOptions(placement="zero3"), job.ADAMW, dtype=torch.bfloat16)
    return {**job.train(engine, range(STEPS)), "dtypes": {piece.tensor.dtype for piece in engine.pieces()}}


def test_other_placements_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel.placement=topo.*ddp, zero2, zero3, hsdp"):
        build(ParallelOptions(placement="topo"), job.ADAMW)
