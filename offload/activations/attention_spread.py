"""Attention by tiles where several ranks share a sequence: each has a part of the tokens, and attends for some heads.

Every rank cuts its tokens into as many tiles as the others (`Tiling`). Keys and values of all tiles go to the ranks of
their heads first; then, tile by tile, the queries of tile number i of every rank do, and what attention makes of them
comes back. A rank's tokens lie one after the other, so a tile's place among all tiles is known: those of the ranks
before it, and then its own. Its queries attend to the tiles of keys up to that place.

    rank 0   0 1 2        step i: queries of tiles i, 3 + i, 6 + i, for this rank's heads
    rank 1   3 4 5
    rank 2   6 7 8

So each rank computes as much in a step as the others, and all issue the same collectives in the same order: in the
forward keys and values of each tile, then of each tile queries there and the result back; the same in the backward,
and behind a tile's replay the gradients back and there; at last the gradients of keys and values of each tile back.

Shapes: B sequences, T tokens of a tile on this rank, T' of the same tile on all ranks together, H heads, H' of this
rank, of size E.

Source: arXiv 2309.14509 (Ulysses), arXiv 2408.16978 (with tiles).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from offload.activations.attention_tiles import Keys, attend, attended


class Spread(Protocol):
    """The ranks that share sequences. All act on the same tile at the same time."""

    rank: int

    def tokens(self) -> Sequence[int]:
        """How many each rank has, in their order, of the sequences at hand."""
        ...

    def to_heads(self, tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """From (B, H, T, E) each to (B, T', H', E): of all ranks' tokens, `lengths` of them, this rank's heads. With a
        gradient."""
        ...

    def to_tokens(self, whole: Tensor, lengths: Sequence[int]) -> Tensor:
        """Back from (B, T', H', E) to (B, H, T, E). With a gradient."""
        ...


class Alone:
    """One rank that has whole sequences."""

    rank = 0

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def tokens(self) -> Sequence[int]:
        return [self._num_tokens]

    def to_heads(self, tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        return [tensor.transpose(1, 2) for tensor in tensors]

    def to_tokens(self, whole: Tensor, lengths: Sequence[int]) -> Tensor:
        return whole.transpose(1, 2)


@dataclass(frozen=True)
class Tiling:
    """Each rank's tokens cut into as many tiles, none of them empty: all of `tile_tokens`, but the last."""

    lengths: tuple[int, ...]
    """Tokens of each rank; they differ by one at the most."""
    rank: int
    tile_tokens: int

    @classmethod
    def of(cls, lengths: Sequence[int], rank: int, tile_tokens: int) -> "Tiling":
        """Of about `tile_tokens`: fewer, or more, where ranks would have another number of tiles."""
        longest, shortest = max(lengths), min(lengths)
        sizes = (*range(min(tile_tokens, longest), 0, -1), *range(tile_tokens + 1, longest + 1))
        alike = next(size for size in sizes if -(-longest // size) == -(-shortest // size))
        return cls(tuple(lengths), rank, alike)

    @cached_property
    def tiles(self) -> list[slice]:
        """Of this rank's tokens."""
        return [
            self._tile(number, self.lengths[self.rank]) for number in range(-(-max(self.lengths) // self.tile_tokens))
        ]

    def sizes(self, number: int) -> list[int]:
        """Tokens of tile `number` on each rank."""
        tiles = (self._tile(number, length) for length in self.lengths)
        return [tile.stop - tile.start for tile in tiles]

    def place(self, rank: int, number: int) -> int:
        """Of tile `number` of `rank` among all, in the order of their tokens."""
        return rank * len(self.tiles) + number

    def _tile(self, number: int, length: int) -> slice:
        return slice(number * self.tile_tokens, min((number + 1) * self.tile_tokens, length))


class SpreadAttention:
    """Attention of one block's tiles. Lists of keys are in the order of their tokens, of this rank's heads."""

    def __init__(self, spread: Spread, tiling: Tiling) -> None:
        self._spread, self._tiling = spread, tiling

    def keys(self, of_tiles: Iterable[Keys]) -> list[Keys]:
        """Of all ranks' tiles, from those of this rank's, (B, K, T, E) each."""
        found: list[list[Keys]] = []
        for number, keys in enumerate(of_tiles):
            k, v = (self._pieces(whole, number) for whole in self._spread.to_heads(keys, self._tiling.sizes(number)))
            found.append(list(zip(k, v, strict=True)))
        return [of_tile[rank] for rank in range(len(self._tiling.lengths)) for of_tile in found]

    def grads(self, grads: list[Keys | None], number: int, keys: Keys) -> list[Tensor]:
        """Of `keys` (B, K, T, E), this rank's of tile `number`, from those of all ranks' and of this rank's heads,
        which are let go of."""
        found = [_taken(grads, place) for place in self._places(number)]
        k, v = (_joined([one.transpose(1, 2) for one in of_ranks], 1) for of_ranks in zip(*found, strict=True))
        both = torch.cat((k, v)).to(keys[0].dtype)
        back = self._back(both, number)
        num_heads = keys[0].size(1)
        if back.size(1) > num_heads:  # those that were repeated, one beside the other
            back = back.unflatten(1, (num_heads, -1)).sum(2)
        return list(back.chunk(2))

    def _places(self, number: int) -> list[int]:
        """Of tile `number` of each rank."""
        return [self._tiling.place(rank, number) for rank in range(len(self._tiling.lengths))]

    def attend(self, q: Tensor, keys: Sequence[Keys], number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the queries (B, H, T, E) of tile `number`: output of the same shape, and to be stored that of this rank's
        heads (B, T', H', E) with its log-sum-exp (B, H', T')."""
        queries = self._queries(q, number)
        found = [attend(q, keys[: place + 1]) for q, place in zip(queries, self._places(number), strict=True)]
        whole = _joined([out.transpose(1, 2) for out, _ in found], 1)
        return self._back(whole, number), whole, _joined([sums for _, sums in found], 2)

    def attended(
        self,
        q: Tensor,
        *,
        number: int,
        keys: Sequence[Keys],
        grads: list[Keys | None],
        stored: Sequence[Tensor],
        anchor: Tensor,
    ) -> Tensor:
        """The same output with a gradient, see `offload.activations.attention_tiles.attended`. stored: what `attend`
        made, where it is known."""
        outs = [
            attended(q, keys=keys[: place + 1], grads=grads, stored=known, anchor=anchor)
            for q, place, known in zip(
                self._queries(q, number), self._places(number), self._known(stored, number), strict=True
            )
        ]
        return self._back(_joined([out.transpose(1, 2) for out in outs], 1), number)

    def _queries(self, q: Tensor, number: int) -> list[Tensor]:
        """This rank's heads of the queries of each rank's tile."""
        (whole,) = self._spread.to_heads([q], self._tiling.sizes(number))
        assert whole.size(2) * len(self._tiling.lengths) == q.size(1), (
            "checked before, see SequenceParallel.check_heads"
        )
        return self._pieces(whole, number)

    def _back(self, whole: Tensor, number: int) -> Tensor:
        return self._spread.to_tokens(whole, self._tiling.sizes(number))

    def _known(self, stored: Sequence[Tensor], number: int) -> list[list[Tensor]]:
        """What is stored of each rank's tile."""
        if not stored:
            return [[] for _ in self._tiling.lengths]
        out, sums = stored
        parts = sums.split(self._tiling.sizes(number), dim=2)
        return [[one, part.contiguous()] for one, part in zip(self._pieces(out, number), parts, strict=True)]

    def _pieces(self, whole: Tensor, number: int) -> list[Tensor]:
        """(B, T', H', E) as (B, H', T, E) of each rank."""
        return [piece.transpose(1, 2) for piece in whole.split(self._tiling.sizes(number), dim=1)]


def _taken(grads: list[Keys | None], place: int) -> Keys:
    """A tile's gradients, which nobody needs any more."""
    found, grads[place] = grads[place], None
    assert found is not None
    return found


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
