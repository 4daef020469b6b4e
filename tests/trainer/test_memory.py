"""The picture of a step's memory: who holds it, and that watching changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from offload.options import ActivationOptions, OffloadOptions
from trainer.job import Job
from trainer.loop import PICTURED, Trainer
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions

MODEL = LlamaOptions(dim=64, ffn_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
TOKENS = 4 * 32


def run(root: Path, name: str, *, plot: bool, **activations: Any) -> list[float]:
    text = root / "text.txt"
    if not text.exists():
        text.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(2000)))
    job = Job(
        model=MODEL,
        data=DataOptions(source="text", paths=[str(text)], valid_fraction=0, cache_dir=str(root / "cache")),
        train=TrainOptions(steps=PICTURED + 1, seq_len=32, global_batch_size=4, eval_sequences=0, sample_tokens=0),
        offload=OffloadOptions(activations=ActivationOptions(**activations)),
        logger=LoggerOptions(tensorboard=False, plot=plot),
        run=RunOptions(root=str(root), name=name),
    )
    events: list[dict[str, Any]] = []
    Trainer(job, emit=events.append).train()
    return [event["loss"] for event in events if event["type"] == "step"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("runs")
    losses = run(root, "plain", plot=False)
    found = {}
    for name, options in (("keep", {}), ("swap", {"mode": "swap", "alpha": 0.0, "keep_last": 0})):
        assert run(root, name, plot=True, **options) == losses
        assert (root / name / "memory.png").read_bytes().startswith(b"\x89PNG")
        found[name] = json.loads((root / name / "memory.json").read_text())
    assert not (root / "plain" / "memory.json").exists()
    return found


def test_every_border_of_the_step_is_there_once(pictures: dict[str, dict[str, Any]]) -> None:
    picture = pictures["keep"]
    assert picture["step"] == PICTURED - 1
    borders = [point["at"] for point in picture["points"]]
    units = ["Embedding 0", *(f"Block {i}" for i in range(1, 5)), "Head 5"]
    there, back = [f"{unit} forward" for unit in units], [f"{unit} backward" for unit in reversed(units)]
    assert borders == ["step begins", *there, *back, "step ends"]


def test_owners_hold_what_they_must(pictures: dict[str, dict[str, Any]]) -> None:
    points = {point["at"]: point for point in pictures["keep"]["points"]}
    num_params = 4 * (64 * 128 + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 64 * 259
    owned = points["Head 5 forward"]["owners"]
    assert owned["optimizer states"] == pytest.approx(8 * num_params, rel=0.05)  # fp32 weights are the masters
    assert owned["parameters"] == pytest.approx(4 * num_params, rel=0.05)
    inputs = 4 * TOKENS * 64
    grown = [points[f"Block {i} forward"]["owners"]["activations"] for i in range(1, 5)]
    steps = [b - a for a, b in zip(grown, grown[1:], strict=False)]
    assert len(set(steps)) == 1 and steps[0] > 10 * inputs  # each block keeps as much
    assert points["step ends"]["owners"]["activations"] < steps[0]
    assert points["step ends"]["owners"]["gradients"] == 0
    peak = pictures["keep"]["peak"]["peak"]
    assert all(sum(point["owners"].values()) <= peak for point in points.values())


def test_swapping_is_seen(pictures: dict[str, dict[str, Any]]) -> None:
    def most(name: str, owner: str) -> int:
        return max(point["owners"][owner] for point in pictures[name]["points"])

    assert most("swap", "activations") < 0.5 * most("keep", "activations")
    assert most("swap", "swapped activations") > 0 == most("keep", "swapped activations")
    assert pictures["swap"]["peak"]["peak"] < pictures["keep"]["peak"]["peak"]
