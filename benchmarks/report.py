"""What a benchmark leaves behind: when, where, with which versions, by which command, and the figures."""

import json
import platform
import sys
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
        "command": "python " + " ".join(sys.argv),
        "rows": rows,
    }
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
