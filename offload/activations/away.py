"""What one forward of a block that runs by tiles left in a slot of host memory: tile after tile, of each its fields."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.activations.attention_spread import Tiling
from offload.activations.memory import ALIGN, Lease
from offload.space import round_up


@dataclass(frozen=True)
class Field:
    """What is stored of each tile: a tensor with its tokens at `dim`."""

    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    of_all: bool
    """Whether it is of all ranks' tokens of the tile, not of this rank's."""

    @classmethod
    def of(cls, tensor: Tensor, dim: int, *, of_all: bool = False) -> "Field":
        return cls(tuple(tensor.shape), dim, tensor.dtype, of_all)

    def of_tokens(self, num: int) -> list[int]:
        return [num if place == self.dim else size for place, size in enumerate(self.shape)]

    def bytes(self, num_tokens: int) -> int:
        return round_up(torch.Size(self.of_tokens(num_tokens)).numel() * self.dtype.itemsize, ALIGN)


class Away:
    """Where each field of each tile lies. All tiles but the last take as much."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        self.fields: list[Field] = []
        self.lease: Lease | None = None

    def bytes(self, growth: float = 1.0) -> int:
        """Of all tiles, of so many times the tokens; on the rank that has most."""
        whole, rest = divmod(math.ceil(growth * max(self.tiling.lengths)), self.tiling.tile_tokens)
        return whole * self.whole_tile_bytes() + self._of_tokens(rest)

    def whole_tile_bytes(self) -> int:
        """Of a tile of as many tokens as one has."""
        return self._of_tokens(self.tiling.tile_tokens)

    def tile_bytes(self, number: int, num_fields: int | None = None) -> int:
        """Of tile `number`, the last of which may be shorter: of its first fields, or of all."""
        return sum(field.bytes(self._num_tokens(field, number)) for field in self.fields[:num_fields])

    def in_slot(self, data: Tensor, number: int) -> Tensor:
        """The bytes of tile `number`."""
        start = number * self.whole_tile_bytes()
        return data[start : start + self.tile_bytes(number)]

    def views(self, data: Tensor, number: int, num_fields: int | None = None) -> list[Tensor]:
        """The first fields of tile `number`, from the beginning of `data`."""
        start, found = 0, []
        for field in self.fields[:num_fields]:
            num_tokens = self._num_tokens(field, number)
            shape = field.of_tokens(num_tokens)
            size_bytes = torch.Size(shape).numel() * field.dtype.itemsize
            found.append(data[start : start + size_bytes].view(field.dtype).view(shape))
            start += field.bytes(num_tokens)
        return found

    def _num_tokens(self, field: Field, number: int) -> int:
        sizes = self.tiling.sizes(number)
        return sum(sizes) if field.of_all else sizes[self.tiling.rank]

    def _of_tokens(self, num: int) -> int:
        """Of a tile of so many tokens on each rank."""
        ranks = len(self.tiling.lengths)
        return sum(field.bytes(num * ranks if field.of_all else num) for field in self.fields)
