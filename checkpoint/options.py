"""Options of the persisted checkpoint."""

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

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"checkpoint.every_steps={self.every_steps}: must be 0 or more")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last}: at least the last one must be kept")
        if self.chunk_bytes < 4096:
            raise ValueError(f"checkpoint.chunk_bytes={self.chunk_bytes}: must be 4096 or more")
