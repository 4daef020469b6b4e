"""A run that shares sequences over two ranks, of uneven parts, with activations that leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_losses_are_those_of_one_rank_and_swapping_changes_no_bit() -> None:
    """Of two micro-batches a step; by tiles to rounding, and both ways of that alike."""
    done = subprocess.run(
        [sys.executable, "tests/trainer/sequence_run.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert list(found) == ["alone", "keep", "swap 1", "swap 0", "stream", "stream_input", "auto"]
    assert len(found["alone"]) == 3 + 2, "steps, and validations before and after"
    assert found["keep"] == pytest.approx(found["alone"], rel=1e-6)
    assert found["swap 1"] == found["keep"] == found["swap 0"]
    assert found["stream"] == found["stream_input"] == found["auto"] == pytest.approx(found["alone"], rel=1e-6)
