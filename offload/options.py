"""What may leave GPU memory."""

from dataclasses import dataclass

ACTIVATIONS = ("keep", "recompute")


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    activations: str = "keep"
    """``keep`` what a block saves for its backward, or ``recompute`` it from the block's input (33% more FLOPs)."""

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"offload.activations={self.activations!r}: choose one of {', '.join(ACTIVATIONS)}")
