"""DeepSpeed's ZeRO trains the same job as plain PyTorch, and its state goes out and in by ranges."""

import sys
from typing import Any

import pytest
import torch

from offload.state import filling
from parallel.deepspeed import DeepSpeedEngine
from parallel.options import OptimizerOptions, ParallelOptions
from tests.parallel import reference_job as job

STEPS = 6
SGD = OptimizerOptions(name="sgd", lr=job.ADAMW.lr, momentum=0.9)
PLACEMENTS = ("zero1", "zero2", "zero3")


def build(
    placement: str, dtype: torch.dtype = torch.float32, optimizer: OptimizerOptions = job.ADAMW
) -> DeepSpeedEngine:
    model = job.awkward_on_meta()
    return DeepSpeedEngine(
        model,
        units=model.units(),
        initial=job.initial,
        optimizer=optimizer,
        options=ParallelOptions(placement=placement),
        dtype=dtype,
        device=torch.device("cpu"),
        clip_norm=job.CLIP,
    )


def train_and_resume(rank: int) -> dict[str, Any]:
    """Train; once more with the state taken out half way, loaded into a new engine, and continued."""
    results: dict[str, Any] = {}
    for placement in PLACEMENTS:
        engine = build(placement)
        result = job.train(engine, range(STEPS // 2))
        saved = job.gather_state(engine)
        rest = job.train(engine, range(STEPS // 2, STEPS))
        other = build(placement)
        other.load(filling(job.reader(saved)), moments=True)
        other.updates = STEPS // 2
        results[placement] = {
            "losses": torch.cat([result["losses"], rest["losses"]]),
            "norms": torch.cat([result["norms"], rest["norms"]]),
            "state": job.gather_state(engine),
            "rest": rest,
            "resumed": job.train(other, range(STEPS // 2, STEPS)),
            "resumed_state": job.gather_state(other),
            "bytes": engine.state_bytes(),
        }
    sgd = build("zero2", optimizer=SGD)
    results["sgd"] = job.train(sgd, range(STEPS)) | {"state": job.gather_state(sgd)}
    half = build("zero3", torch.bfloat16)
    results["bf16"] = job.train(half, range(STEPS)) | {"dtypes": {piece.tensor.dtype for piece in half.pieces()}}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    return job.spawn(train_and_resume, 2, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("case", [*PLACEMENTS, "sgd"])
def test_equals_plain_pytorch(results: list[dict[str, Any]], case: str) -> None:
    result, plain = (
        results[0][case],
        job.train_plainly(2, STEPS, SGD if case == "sgd" else job.ADAMW, decay_unused=True),
    )
    torch.testing.assert_close(result["losses"], plain["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(result["norms"], plain["norms"], rtol=1e-5, atol=0)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(result["state"][name, "master"].view_as(weight), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_continues_identically_from_its_pieces(results: list[dict[str, Any]], placement: str) -> None:
    result = results[0][placement]
    torch.testing.assert_close(result["resumed"], result["rest"], rtol=0, atol=0)
    torch.testing.assert_close(result["resumed_state"], result["state"], rtol=0, atol=0)


def test_bf16_keeps_fp32_masters(results: list[dict[str, Any]]) -> None:
    assert results[0]["bf16"]["dtypes"] == {torch.float32}
    plain = job.train_plainly(2, STEPS, job.ADAMW, decay_unused=True)
    torch.testing.assert_close(results[0]["bf16"]["losses"], plain["losses"], rtol=3e-2, atol=0)


def test_zero3_divides_the_weights_between_the_ranks(results: list[dict[str, Any]]) -> None:
    numel = sum(param.numel() for param in job.awkward_on_meta().parameters())
    assert max(rank["zero3"]["bytes"]["parameters"] for rank in results) < 4 * 0.6 * numel


def test_other_placements_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel.placement=hsdp.*zero1, zero2 or zero3"):
        build("hsdp")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="atoll.deepspeed"):
        build("zero1")
