"""What went wrong in a run, and how it went on: ``failures.jsonl`` of its folder, one object a failure.

The supervisor appends a record once the failure is recovered from or given up. `atoll report` and others read it.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Cause = Literal["process", "node", "hang", "device", "preemption", "numbers", "error"]
"""A worker's process died; its node did; nothing moved; CUDA or NCCL failed; the machine was claimed back; the loss was
no number or out of its range; an exception of any other kind."""
Source = Literal["memory", "storage", "start"]
"""Where the state came from: the nodes' snapshots, a checkpoint in storage, or nowhere, from step 0."""

FILE = "failures.jsonl"
TEAM_FILE = "team.json"


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """One failure. ``restored_from`` is ``"from"`` in the file."""

    time: float
    """Unix time of the detection, in seconds."""
    cause: Cause
    what: str
    """A sentence for people."""
    rank: int | None
    """None where it was no rank's alone, as with a node that held none."""
    node: str | None
    """Address of the node."""
    found_s: float
    """From the last sign of life to the detection."""
    restored_from: Source | None
    """None where it was given up."""
    step: int
    """Steps that were done when the ranks stopped for it."""
    resumed_step: int | None
    steps_lost: int | None
    recover_s: float | None
    """From the detection to the end of the next step."""
    world_before: int
    world_after: int | None

    def append(self, path: Path) -> None:
        """Add it to the file `path`: whole or not at all, and on the disk when this returns."""
        tree = asdict(self)
        tree["from"] = tree.pop("restored_from")
        line = (json.dumps(tree) + "\n").encode()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)

    @classmethod
    def read(cls, path: Path) -> "list[FailureRecord]":
        """All records of the file, oldest first; empty if there is none. A line torn by a kill is left out."""
        records = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                tree = json.loads(line)
                records.append(cls(restored_from=tree.pop("from"), **tree))
            except (ValueError, TypeError, KeyError):
                continue
        return records
