"""Options of the persisted checkpoint, and of the snapshots in memory."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    every_steps: int = 0
    """Persist a checkpoint after every so many steps; 0: only at the end and when told to stop."""
    keep_last: int = 2
    """How many committed checkpoints are kept; older ones are deleted once a newer one is committed."""
    url: str = ""
    """Folder or fsspec URL (``s3://…``, ``memory://…``) that holds them; empty: ``checkpoints/`` in the run."""
    chunk_bytes: int = 64 << 20
    """Largest zarr chunk, in bytes; one object in the store each."""
    snapshot_every_steps: str = "0"
    """Keep a snapshot in the nodes' memory after every so many steps; ``0``: none; ``auto``: as often as costs 1%."""
    parity: int | None = None
    """Nodes of a group that may be lost at once, their snapshots too. None: 1, or 0 where there is one node."""
    group_nodes: int | None = None
    """Nodes that keep each other's parity. None: up to 8."""
    snapshot_hold_s: float = 900.0
    """How long snapshots stay in memory while no worker is there: the time to start the run again after a crash."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"checkpoint.every_steps={self.every_steps}: must be 0 or more")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last}: at least the last one must be kept")
        if self.chunk_bytes < 4096:
            raise ValueError(f"checkpoint.chunk_bytes={self.chunk_bytes}: must be 4096 or more")
        if self.snapshot_every_steps != "auto" and not self.snapshot_every_steps.isdigit():
            raise ValueError(f"checkpoint.snapshot_every_steps={self.snapshot_every_steps}: choose 0, a number or auto")
        if self.parity is not None and self.parity < 0:
            raise ValueError(f"checkpoint.parity={self.parity}: must be 0 or more")
        if self.group_nodes is not None and self.group_nodes < 1:
            raise ValueError(f"checkpoint.group_nodes={self.group_nodes}: must be 1 or more")
        if not self.snapshot_hold_s > 0:
            raise ValueError(f"checkpoint.snapshot_hold_s={self.snapshot_hold_s}: must be positive")

    @property
    def snapshots(self) -> bool:
        return self.snapshot_every_steps == "auto" or int(self.snapshot_every_steps) > 0
