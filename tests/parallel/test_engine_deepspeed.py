"""DeepSpeed's ZeRO trains the same job as plain PyTorch, and its state goes out and in by ranges."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.deepspeed import DeepSpeedEngine
from parallel.options import OptimizerOptions, ParallelOptions
from tests.parallel import reference_job as job

STEPS = 6
PLACEMENTS = ("zero1", "zero2", "zero3")


def build(placement: str, dtype: torch.dtype = torch.float32, **changes: Any) -> DeepSpeedEngine:
    model = job.awkward_on_meta()
    return DeepSpeedEngine(
        model,
        units=model.units(),
        initial=job.initial,
        optimizer=changes.pop("optimizer", job.ADAMW),
        options=ParallelOptions(placement=placement),
        dtype=dtype,
        device=torch.device("cpu"),
        **changes,
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
        other.load(job.reader(saved), moments=True)
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
        half = build(placement, torch.bfloat16)
        results[placement]["bf16"] = job.train(half, range(STEPS))["losses"]
        results[placement]["bf16_state"] = job.gather_state(half)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    return job.spawn(train_and_resume, 2, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_equals_plain_pytorch(results: list[dict[str, Any]], placement: str) -> None:
    result, plain = results[0][placement], job.train_plainly(2, STEPS, job.ADAMW, decay_unused=True)
    torch.testing.assert_close(result["losses"], plain["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(result["norms"], plain["norms"], rtol=1e-5, atol=0)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(result["state"][name, "master"].view_as(weight), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_continues_identically_from_its_pieces(results: list[dict[str, Any]], placement: str) -> None:
    result = results[0][placement]
    torch.testing.assert_close(result["resumed"], result["rest"], rtol=0, atol=0)
    torch.testing.assert_close(result["resumed_state"], result["state"], rtol=0, atol=0)
