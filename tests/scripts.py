"""Scripts of the tests that start ranks of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lines_of(*arguments: str, timeout_s: float, given: str | None = None) -> list[str]:
    """What Python prints, run in the project's folder with one OpenMP thread a process; it is to end with 0."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
