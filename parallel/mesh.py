"""Ranks laid out over the levels of the interconnect, slowest link first.

A rank is the row-major index of its coordinates: with ``{node: 2, gpu: 4}`` rank 6 is gpu 2 of node 1. Everything
sharded over several levels is cut at the *innermost* level first (`Mesh.shard`), so that a range sharded over more
levels lies inside the one sharded over fewer: optimizer range ⊆ gradient range ⊆ parameter range.
"""

import math
from collections.abc import Mapping

import torch.distributed as dist


class Mesh:
    """The levels, this rank's coordinates, and the process groups between them."""

    def __init__(self, levels: Mapping[str, int], *, rank: int = 0) -> None:
        self.names = tuple(levels)
        self.sizes = tuple(levels.values())
        self.num_levels = len(self.sizes)
        self.world = math.prod(self.sizes)
        self.rank = rank
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside the mesh {self}, which has {self.world} ranks")
        self.coordinates = tuple(rank // math.prod(self.sizes[i + 1 :]) % size for i, size in enumerate(self.sizes))
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}

    @classmethod
    def of(cls, levels: Mapping[str, int], *, rank: int, world: int) -> "Mesh":
        """The mesh for `world` ranks; with none, one level of them all. ValueError where they do not multiply to it."""
        levels = dict(levels) or {"worker": world}
        if math.prod(levels.values()) != world:
            shown = " x ".join(f"{name} {size}" for name, size in levels.items())
            raise ValueError(
                f"parallel.levels ({shown}) multiply to {math.prod(levels.values())}, but there are {world} workers; "
                f"change parallel.levels or launch.workers"
            )
        return cls(levels, rank=rank)

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))

    def wide(self, level: int) -> bool:
        """Whether the level has more than one member, so that data crosses it."""
        return self.sizes[level] > 1

    def shard(self, size: int, num_levels: int) -> tuple[int, int]:
        """This rank's ``start, stop`` of `size` elements sharded over the innermost `num_levels` levels."""
        start, length = 0, size
        for level in range(self.num_levels - 1, self.num_levels - 1 - num_levels, -1):
            length //= self.sizes[level]
            start += self.coordinates[level] * length
        return start, start + length

    def group(self, first: int, last: int) -> dist.ProcessGroup | None:
        """The ranks that differ from this one in the levels ``first:last`` alone, in order; None where it is alone.

        The first call for a pair is collective over the whole world: every rank asks for the same in the same order.
        """
        size = math.prod(self.sizes[first:last])
        if size == 1:
            return None
        if size == self.world:
            return dist.group.WORLD
        if (first, last) not in self._groups:
            inner = math.prod(self.sizes[last:])
            for rank in range(self.world):
                if rank // inner % size == 0:  # the first member names its group
                    members = [rank + i * inner for i in range(size)]
                    group = dist.new_group(members)
                    if self.rank in members:
                        self._groups[first, last] = group
        return self._groups[first, last]
