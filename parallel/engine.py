"""What the training loop needs of an engine: ours, FSDP2 or DeepSpeed."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from offload.state import Fill, Movable, Piece

Accept = Callable[[Tensor], bool]
"""Given the global gradient norm before clipping: whether to update. All ranks answer alike; it may wait."""


class Engine(Protocol):
    """One rank's share of a model in training. Every method but `pieces` and those that tell of bytes is collective."""

    model: nn.Module
    updates: int
    """Optimizer steps taken; set it after `load` to go on from there."""

    def forward_backward(self, *inputs: Any, scale: float, first: bool, last: bool) -> Tensor:
        """Run ``model(*inputs)`` (a 0-dim loss) and the backward of ``scale * loss``; returns the loss, detached.

        Gradients are summed over ranks and over the micro-batches from ``first`` to ``last``: the caller passes
        ``scale = 1 / (ranks * micro-batches)`` to get the mean.
        """

    def evaluate(self, *inputs: Any) -> Tensor:
        """``model(*inputs)`` without gradients."""

    def expect(self, lr: float) -> None:
        """Before a step's first forward: the `lr` that `step` will be called with, so that updates may begin before."""

    def step(self, lr: float, clip_norm: float | None, accept: Accept | None = None) -> Tensor:
        """Clip, update, and make the new weights visible. Returns the global gradient norm before clipping.

        Where `accept` is given and says no, the gradients are forgotten: weights, moments and `updates` are to the last
        bit what they would be without this step.
        """

    def pieces(self) -> Iterator[Piece]:
        """The ranges of state that this rank writes into a checkpoint: over all ranks, each element exactly once.

        With state away from the device, a piece is good until the next is asked for.
        """

    def movable(self) -> Movable:
        """What of the state may go elsewhere with an update: none where it is on the device. Ask once."""

    def load(self, fill: Fill, *, moments: bool) -> None:
        """Fill the weights (and the optimizer's state, if `moments`) by `fill`, each rank its own ranges."""

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds for good: ``parameters master optimizer``, ``residuals`` (of error feedback), and
        ``buffers`` (what is gathered and on its way)."""

    def passing_bytes(self) -> dict[str, int]:
        """Bytes on the device now that are not there for good, by owner: ``gradients``, ``swapped activations``. Empty
        where the engine does not know."""

    def written_bytes_per_s(self) -> float:
        """To drives: by states since the first update, by activations since this engine was made."""

    def close(self) -> None:
        """Let go of host memory, drives and threads; the engine is of no use afterwards."""
