"""Whole blocks run over a few tokens at a time, and what they leave goes to host memory and comes back by these tiles.

A block that offers what `TiledBlock` says is one node of autograd's graph here, without a `Tape`.

    forward   k, v of each tile; then for each tile its queries attend to the tiles of keys up to its own, and the rest
              of the block runs. x, attention's output and its log-sum-exp are copied out.
    backward  x comes tile by tile and k, v are made again. Then from the last tile to the first: x, attention's output
              and log-sum-exp come; the tile runs again with what attention gave, and backward; attention's backward
              adds to the gradients of k, v of the tiles up to its own. No later tile adds to those of its own any
              more, so k, v of this tile go backward too, and its dx is done.

So what exists for all tokens is x and the block's output, or their gradients, k and v, and in the backward the fp32
gradients of k and v, which go with their tiles. The rest is of one tile, and of two more on their way. With
``stream_input`` x alone leaves, and attention is computed again.

Weight gradients of tiles are summed in fp32 and given to autograd once. A block must draw nothing at random, and a
graph is gone through once.

[Note: who may use which memory] As in `offload.activations`: x is let go of when the block ends, after it has been
copied out, which it has as good as always; what attention made is held for two tiles, and of the last ones like what
other blocks leave. Tiles come back into two buffers that take turns. A slot is given back with its last copy-in.

Source: arXiv 2408.16978 (fully pipelined distributed transformer), with one device; arXiv 2310.01889.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from offload.activations_memory import ALIGN, Lease, Pools, mark, on, wait
from offload.activations_slots import Event, Memory
from offload.activations_tiles import WeightSums
from offload.attention_tiles import Keys, attend, attended, check_dtype
from offload.options import ActivationOptions
from offload.space import round_up

IN_FLIGHT = 2
"""Tiles that are held until they have been copied out."""


class TiledBlock(Protocol):
    """What a block offers to be run by tiles. x (B, T, D): some of its tokens; tables: whatever else it is called with,
    tensors whose first dimension is the tokens', of the same tokens. Neither looks at other tokens, nor draws at
    random."""

    def keys(self, x: Tensor, *tables: Tensor) -> Keys:
        """Keys and values, each (B, K, T, E)."""
        ...

    def tile(self, x: Tensor, *tables_and_attend: Any) -> Tensor:
        """The block's output (B, T, D). The last argument, ``attend``, takes the tile's queries (B, H, T, E) and
        returns what causal attention makes of them, once."""
        ...


def can_stream(block: nn.Module) -> bool:
    """Whether it is a `TiledBlock`."""
    return callable(getattr(block, "keys", None)) and callable(getattr(block, "tile", None))


def check_blocks(
    options: ActivationOptions, blocks: Sequence[nn.Module], dtype: torch.dtype, device: torch.device
) -> None:
    """ValueError for blocks, or a dtype of compute, that cannot be run by tiles."""
    for block in blocks:
        if not can_stream(block):
            raise ValueError(
                f"offload.activations.mode={options.mode}: {type(block).__name__} does not say how it runs by tiles "
                "(keys and tile, docs/activations.md); set offload.activations.mode=swap, or input"
            )
    check_dtype(dtype, device)


@dataclass(frozen=True)
class _Field:
    """What is stored of each tile: a tensor with its tokens at `dim`."""

    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, dim: int) -> "_Field":
        return cls(tuple(tensor.shape), dim, tensor.dtype)

    def of_tokens(self, num: int) -> list[int]:
        return [num if place == self.dim else size for place, size in enumerate(self.shape)]

    def bytes(self, num_tokens: int) -> int:
        return round_up(torch.Size(self.of_tokens(num_tokens)).numel() * self.dtype.itemsize, ALIGN)


class _Away:
    """What one forward left: tile after tile, of each its fields."""

    def __init__(self, num_tokens: int, tile_tokens: int) -> None:
        self.tile_tokens = min(tile_tokens, num_tokens)
        self.tiles = [slice(start, min(start + tile_tokens, num_tokens)) for start in range(0, num_tokens, tile_tokens)]
        self.fields: list[_Field] = []
        self.lease: Lease | None = None

    def bytes(self, num_tokens: int) -> int:
        """Of so many tokens, all tiles."""
        whole, rest = divmod(num_tokens, self.tile_tokens)
        return whole * self.tile_bytes(self.tile_tokens) + self.tile_bytes(rest)

    def tile_bytes(self, num_tokens: int, num_fields: int | None = None) -> int:
        return sum(field.bytes(num_tokens) for field in self.fields[:num_fields])

    def in_slot(self, data: Tensor, number: int) -> Tensor:
        """The bytes of tile `number`."""
        size_bytes = self.tile_bytes(self.tiles[number].stop - self.tiles[number].start)
        start = number * self.tile_bytes(self.tile_tokens)
        return data[start : start + size_bytes]

    def views(self, data: Tensor, number: int, num_fields: int | None = None) -> list[Tensor]:
        """The first fields of tile `number`, from the beginning of `data`."""
        num_tokens, start, found = self.tiles[number].stop - self.tiles[number].start, 0, []
        for field in self.fields[:num_fields]:
            shape = field.of_tokens(num_tokens)
            size_bytes = torch.Size(shape).numel() * field.dtype.itemsize
            found.append(data[start : start + size_bytes].view(field.dtype).view(shape))
            start += field.bytes(num_tokens)
        return found


@dataclass(frozen=True)
class Place:
    """Which block it is of those that leave something."""

    number: int
    num: int
    growth: float
    """How many times its tokens may still come at once."""
    hold: Callable[[Event, list[Tensor]], None]
    """Is given what is to be kept until an event has come."""


class Streaming:
    """Runs blocks by tiles. One thread at a time, as `offload.activations.Activations` that it belongs to."""

    def __init__(
        self,
        options: ActivationOptions,
        device: torch.device,
        pools: Pools,
        *,
        streams: tuple[torch.cuda.Stream | None, torch.cuda.Stream | None],
        ended: Callable[[Lease], None],
    ) -> None:
        """streams: for copies out and in. ended: is given what a graph that is gone held."""
        self.options, self.device, self.pools = options, device, pools
        self.out, self.into = streams
        self.ended = ended
        self.stores_attention = not options.input_alone

    def run(self, block: Any, place: Place, x: Tensor, *tables: Tensor) -> Tensor:
        """x (B, S, D); what the block returns."""
        if getattr(F.scaled_dot_product_attention, "tells", False):
            raise ValueError(
                f"parallel.sequence with offload.activations.mode={self.options.mode}: tiles of a block attend for "
                "themselves; leave parallel.sequence empty, or set offload.activations.mode=swap"
            )
        away = _Away(x.size(1), max(1, self.options.stream_tokens // x.size(0)))
        weights = [p for p in block.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (x.requires_grad or weights):
            with torch.no_grad():
                return self.forward(block, away, None, x, tables)
        out: Tensor = _Block.apply(self, block, away, place, tables, x, *weights)  # type: ignore[no-untyped-call]
        return out

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, block: Any, away: _Away, place: Place | None, x: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """place: None where nothing is to be stored."""
        leaving = _Leaving(self, away, place, x) if place else None
        keys = [block.keys(x[:, tile], *_cut(tables, tile)) for tile in away.tiles]
        out = torch.empty_like(x)
        for number, tile in enumerate(away.tiles):
            made: list[Tensor] = []

            def attention(q: Tensor, made: list[Tensor] = made, number: int = number) -> Tensor:
                made.extend(attend(q, keys[: number + 1]))
                return made[0]

            out[:, tile] = block.tile(x[:, tile], *_cut(tables, tile), attention)
            if leaving:
                leaving.leave(number, made[0].transpose(1, 2), made[1])
        if leaving:
            leaving.end()
        return out

    # ------------------------------------------------------------------------------------------------ backward

    def backward(
        self, block: Any, away: _Away, tables: Sequence[Tensor], grad: Tensor, wants_x: bool, sums: WeightSums
    ) -> Tensor | None:
        """The gradient of x, if it is wanted; those of the weights are added to `sums`."""
        arriving, num = self._arrive(away), len(away.tiles)
        keys: list[Keys] = []
        for tile in away.tiles:
            (x,) = next(arriving)
            keys.append(block.keys(x, *_cut(tables, tile)))
        grads: list[Keys | None] = [None] * num
        grad_x = torch.empty_like(grad) if wants_x else None
        for number in reversed(range(num)):
            x, *stored = next(arriving)
            if stored:
                stored[0] = stored[0].transpose(1, 2)
            tile = away.tiles[number]
            x, here = x.detach().requires_grad_(wants_x), _cut(tables, tile)
            attention = partial(attended, keys=keys, grads=grads, stored=stored, anchor=sums.anchor)
            with torch.enable_grad():
                out = block.tile(x, *here, attention)
            found = sums.add(x, [out], [grad[:, tile]])
            del out, stored, attention
            with torch.enable_grad():
                own = block.keys(x, *here)
            keys.pop()
            of_keys = grads.pop()
            assert of_keys is not None
            more = sums.add(x, own, of_keys)
            if grad_x is not None:
                assert found is not None
                grad_x[:, tile] = found if more is None else found + more
        next(arriving, None)
        return grad_x

    def _arrive(self, away: _Away) -> Iterator[list[Tensor]]:
        """On the device, until the next is asked for: x of each tile from the first to the last, then all that is
        stored of each from the last to the first. One comes while another is used."""
        lease, num = away.lease, len(away.tiles)
        if lease is None or lease.slot is None:
            raise RuntimeError(
                f"a graph is gone through once with offload.activations.mode={self.options.mode}; set it to swap to do "
                "so again"
            )
        slot = self.pools.brought(lease.slot)
        order = [(number, 1) for number in range(num)] + [(number, len(away.fields)) for number in reversed(range(num))]
        coming: deque[tuple[Memory, Event, list[Tensor]]] = deque()
        try:
            for place, (number, num_fields) in enumerate(order):
                coming.append(self._fetch(away, lease, slot, number, num_fields))
                if place == len(order) - 1:
                    lease.slot = None
                    self.pools.give_slot(slot, coming[-1][1])
                    self.pools.load_ahead()
                if place:
                    yield self._arrived(*coming[0])
                    self.pools.give_buffer(coming.popleft()[0])
            yield self._arrived(*coming[0])
        finally:  # where a backward ends early, too
            for buffer, *_ in coming:
                self.pools.give_buffer(buffer)

    def _fetch(
        self, away: _Away, lease: Lease, slot: Memory, number: int, num_fields: int
    ) -> tuple[Memory, Event, list[Tensor]]:
        num_tokens = away.tiles[number].stop - away.tiles[number].start
        size_bytes = away.tile_bytes(num_tokens, num_fields)
        buffer = self.pools.take_buffer(size_bytes, away.tile_bytes(away.tile_tokens))
        wait(self.device, self.into, lease.left, buffer.free)
        with on(self.into):
            buffer.data[:size_bytes].copy_(away.in_slot(slot.data, number)[:size_bytes], non_blocking=True)
        return buffer, mark(self.device, self.into), away.views(buffer.data, number, num_fields)

    def _arrived(self, _: Memory, arrived: Event, views: list[Tensor]) -> list[Tensor]:
        wait(self.device, None, arrived)
        return views


class _Leaving:
    """What a forward copies out, tile by tile."""

    def __init__(self, streaming: Streaming, away: _Away, place: Place, x: Tensor) -> None:
        self._s, self._away, self._place, self._x = streaming, away, place, x
        self._slot: Memory | None = None
        self._flying: deque[tuple[Event, list[Tensor]]] = deque()

    def leave(self, number: int, *made: Tensor) -> None:
        """made: attention's output (B, T, H, E) and log-sum-exp (B, H, T) of tile `number`."""
        s, away = self._s, self._away
        slot = self._slot or self._take(made)
        if not s.stores_attention:
            return
        wait(s.device, s.out, mark(s.device, None))
        with on(s.out):
            for target, source in zip(away.views(away.in_slot(slot.data, number), number)[1:], made, strict=True):
                target.copy_(source, non_blocking=True)
        assert away.lease is not None
        away.lease.left = mark(s.device, s.out)
        self._flying.append((away.lease.left, list(made)))
        if len(self._flying) > IN_FLIGHT:
            wait(s.device, None, self._flying.popleft()[0])

    def end(self) -> None:
        s, lease = self._s, self._away.lease
        assert lease is not None and self._slot is not None
        wait(s.device, None, self._x_left)  # who called may let go of it
        for event, made in self._flying:
            self._place.hold(event, made)
        size_bytes = self._away.bytes(self._x.size(1))
        lease.slot = s.pools.pass_on(self._slot, size_bytes, lease.left, self._place.number, self._place.num)

    def _take(self, made: Sequence[Tensor]) -> Memory:
        """The slot, once it is known what is stored; all of x goes there."""
        s, away, x, place = self._s, self._away, self._x, self._place
        away.fields = [_Field.of(x, 1)]
        if s.stores_attention:
            away.fields += [_Field.of(made[0], 1), _Field.of(made[1], 2)]
        longest = away.bytes(-int(-place.growth * x.size(1) // 1))
        slot = self._slot = s.pools.take_slot(away.bytes(x.size(1)), place.num, longest)
        away.lease = Lease(slot, None)
        weakref.finalize(away, s.ended, away.lease).atexit = False
        wait(s.device, s.out, mark(s.device, None), slot.free)
        with on(s.out):
            for number, tile in enumerate(away.tiles):
                target = away.views(away.in_slot(slot.data, number), number, 1)[0]
                target.copy_(x[:, tile].detach(), non_blocking=True)
        self._x_left = away.lease.left = mark(s.device, s.out)
        return slot


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streaming: Streaming,
        block: Any,
        away: _Away,
        place: Place,
        tables: Sequence[Tensor],
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.streaming, ctx.block, ctx.away, ctx.tables = streaming, block, away, tables
        ctx.save_for_backward(*weights)  # so that whoever shards them has them there in the backward
        return streaming.forward(block, away, place, x, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        sums = WeightSums([p for p in ctx.block.parameters() if p.requires_grad])
        grad_x = ctx.streaming.backward(ctx.block, ctx.away, ctx.tables, grad, ctx.needs_input_grad[5], sums)
        return None, None, None, None, None, grad_x, *sums.totals()


def _cut(tables: Sequence[Tensor], tile: slice) -> list[Tensor]:
    return [table[tile] for table in tables]
