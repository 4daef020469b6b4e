"""Where each parameter of a unit lies in the unit's flat buffer.

A parameter's place depends on the unit alone, never on the number of ranks; only the padding behind the last one does.
Each starts at a multiple of `ALIGN` elements, which keeps kernels on 256-byte boundaries and lets any shard be cut
into quantization blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGN = 128
"""Elements. A multiple of every alignment that a GEMM or a 16-byte vector access asks for."""


@dataclass(frozen=True)
class Entry:
    name: str
    shape: torch.Size
    numel: int
    start: int
    """Offset in the flat buffer, in elements."""


@dataclass(frozen=True)
class Overlap:
    """The part of a parameter that falls into a range of the flat buffer."""

    index: int
    entry: Entry
    start: int
    """In the parameter's own flattened elements; `stop` likewise."""
    stop: int
    offset: int
    """Of `start`, from the beginning of the range."""

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor that holds the range."""
        return tensor[self.offset : self.offset + self.stop - self.start]


class Layout:
    """The entries of one flat buffer, padded so that `world` ranks cut it into whole blocks of `block` elements."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], world: int, block: int = ALIGN) -> None:
        self.entries: list[Entry] = []
        end = 0
        for name, parameter in named:
            self.entries.append(Entry(name, parameter.shape, parameter.numel(), end))
            end += -(-parameter.numel() // ALIGN) * ALIGN
        block = max(block, ALIGN)  # powers of two: a multiple of both
        # at least a block a rank: buffers without memory are all at one address, and ranges of none cannot be packed
        self.size = max(1, -(-end // (block * world))) * block * world
        self.numel = sum(entry.numel for entry in self.entries)
        """Elements without the padding."""
        self.has_gaps = self.numel != self.size

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter as a view of the whole flat buffer."""
        return [flat[e.start : e.start + e.numel].view(e.shape) for e in self.entries]

    def overlaps(self, start: int, stop: int) -> Iterator[Overlap]:
        """The parts of parameters in ``start:stop`` of the flat buffer, in order."""
        for index, e in enumerate(self.entries):
            low, high = max(start, e.start), min(stop, e.start + e.numel)
            if low < high:
                yield Overlap(index, e, low - e.start, high - e.start, low - start)
