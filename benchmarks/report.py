"""What a benchmark leaves behind: when, where, with which versions, by which command, and the figures."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def write_report(path: str, hardware: str, rows: list[dict[str, Any]]) -> None:
    """Write a JSON object: date, hardware, versions, command, rows."""
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": shlex.join(["python", *sys.argv]),
        "rows": rows,
    }
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


@contextmanager
def gpu_watched() -> Iterator[dict[str, float]]:
    """A dict that has, when the context ends, the clock and the power of the first GPU that this process may use while
    it was busy: medians of a sample a second by nvidia-smi. A GPU that is hot or short of power slows down by itself,
    and figures are to say so. Empty where there is no nvidia-smi."""
    found: dict[str, float] = {}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = ["nvidia-smi", "-i", first, "--query-gpu=utilization.gpu,clocks.sm,power.draw"]
    try:
        watch = subprocess.Popen(
            [*query, "--format=csv,noheader,nounits", "-lms", "1000"], stdout=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        yield found
        return
    try:
        yield found
    finally:
        watch.terminate()
        lines, _ = watch.communicate()
        samples = [line.split(",") for line in lines.splitlines() if line.count(",") == 2]
        busy = [(float(mhz), float(watts)) for load, mhz, watts in samples if float(load) >= 50]
        if busy:
            found["sm_MHz"] = statistics.median(mhz for mhz, _ in busy)
            found["gpu_W"] = statistics.median(watts for _, watts in busy)
