"""Activations that leave from a model whose weights are sharded: nothing changes, whatever the placement."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("placement", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_training_is_bitwise_that_with_activations_kept(placement: str) -> None:
    command = [sys.executable, "tests/offload/activations_world.py", "2", placement]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, env=_environment())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    assert lines == [
        "swap 1.0 0.0",
        "swap 0.0 0.0",
        "recompute None 0.0",
        "input None 0.0",
        "tiles 0.0",
        "stream True",
        "stream_input True",
    ]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
