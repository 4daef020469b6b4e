"""What a run without snapshots has in their place."""

from collections.abc import Callable
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.snapshots.handed_over import Stats
from checkpoint.snapshots.reader import SnapshotReader


class NoSnapshots:
    """With ``checkpoint.snapshot_every_steps=0``: surface of `checkpoint.snapshots.rank.Snapshots`."""

    stats = Stats()

    def steps(self) -> list[int]:
        return []

    def open(self, step: int) -> SnapshotReader:
        raise CheckpointError(f"there is no snapshot of step {step}: checkpoint.snapshot_every_steps=0")

    def start(self, *state: Any) -> None:
        pass

    def due(self, step: int) -> bool:
        return False

    def save(self, *state: Any, background: bool = True, fault: Callable[[], str] = str) -> None:
        pass

    def wait_copied(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def error(self) -> CheckpointError | None:
        return None

    def leave(self) -> None:
        pass

    def close(self, *, dropped: bool = False) -> None:
        pass
