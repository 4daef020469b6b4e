"""The currency that every part trades in: a range of one kind of state of one parameter.

Partitioning says which rank holds which ranges, offloading in which memory they lie, a checkpoint writes and
reads them. A range is named by its parameter, never by a rank or a unit, so that state saved by N ranks under one
placement is read by any M under any other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

MASTER = "master"
"""The kind of the full-precision weights themselves; the optimizer names its other kinds (``exp_avg`` …)."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements ``start:stop`` of the flattened parameter (or module buffer) ``name``, of one kind of state."""

    name: str
    """Fully qualified name in the model, as in ``model.named_parameters()``."""
    kind: str
    """``master``, or a kind of the optimizer: ``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``."""
    start: int
    stop: int
    shape: tuple[int, ...]
    """Shape of the whole parameter; ``stop <= prod(shape)``."""
    tensor: torch.Tensor
    """1-D view of ``stop - start`` elements on whatever device the state lives; changes with the next update."""


Destination = Sequence[torch.Tensor]
"""For each extent of a `Movable` a tensor of its size, where the update may put it."""


def nowhere(wait: bool) -> Destination | None:
    return None


@dataclass(kw_only=True)
class Movable:
    """State in host memory that an update may leave in another place than where it found it, and so there are two
    versions of it without a copy: snapshots give the place (`checkpoint/snapshots`), the update writes there."""

    extents: Sequence[tuple[str, torch.Tensor]]
    """Kind and memory, 1-D fp32, of what stays together: pieces of state are views of it."""
    room: Callable[[bool], Destination | None] = field(default=nowhere)
    """``room(wait)``, asked before each update: None where there is no place but their own, or if that is not to be
    waited for, not yet."""


Read = Callable[[str, str, int, int], torch.Tensor]
"""``read(name, kind, start, stop)`` returns those elements as a 1-D tensor on any device, or raises KeyError."""

Fill = Callable[[Iterable[Piece]], None]
"""``fill(pieces)`` puts what each piece names into its tensor, or raises KeyError before it has touched any. A load
goes by it: a tensor that is made for a `Read` is zeroed, filled and copied from, and only what is asked for at once can
be under way at once."""


def filling(read: Read) -> Fill:
    """A `Fill` from what `read` returns, one piece after another."""

    def fill(pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.stop > piece.start:
                piece.tensor.copy_(read(piece.name, piece.kind, piece.start, piece.stop))

    return fill
