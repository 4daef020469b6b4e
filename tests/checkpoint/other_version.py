"""The code of this repository under another number of its snapshots' format (`checkpoint/snapshots/format.py`)."""

import shutil
from pathlib import Path

import checkpoint
from checkpoint.snapshots.format import FORMAT

ROOT = Path(checkpoint.__file__).parents[1]


def other_version(folder: Path, number: int) -> Path:
    """A copy in `folder`, to be first in a process's PYTHONPATH."""
    for package in ("checkpoint", "offload", "parallel", "trainer", "tests"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / "checkpoint/snapshots/format.py"
    content = module.read_text()
    assert f"FORMAT = {FORMAT}" in content
    module.write_text(content.replace(f"FORMAT = {FORMAT}", f"FORMAT = {number}"))
    return folder
