"""Whole blocks run over a few tokens at a time, and what they leave goes to host memory and comes back by these tiles.

A block that offers what `TiledBlock` says is one node of autograd's graph here, without a `Tape`.

    forward   k, v of each tile; then for each tile its queries attend to the tiles of keys up to its own, and the rest
              of the block runs. x, attention's output and its log-sum-exp are copied out.
    backward  x comes tile by tile and k, v are made again. Then from the last tile to the first: x, attention's output
              and log-sum-exp come; the tile runs again with what attention gave, and backward; attention's backward
              adds to the gradients of k, v of the tiles up to its own. Then x comes once more, tile by tile, and k, v
              go backward too, which completes dx.

So what exists for all tokens is x and the block's output, or their gradients, k and v, and in the backward the fp32
gradients of k and v. The rest is of one tile, and of two more on their way. With ``stream_input`` x alone leaves, and
attention is computed again. Where ranks share sequences a tile is one of each rank's tokens, and k, v, attention and
what is stored of it are of all ranks' tokens and this rank's heads (`offload.activations.attention_spread`).

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

from offload.activations.attention_spread import Alone, Spread, SpreadAttention, Tiling
from offload.activations.attention_tiles import Keys, check_dtype
from offload.activations.away import Away, Field
from offload.activations.memory import Lease, Pools, mark, on, wait
from offload.activations.slots import Event, Memory
from offload.activations.tiles import WeightSums
from offload.options import ActivationOptions

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
        spread: Spread = getattr(F.scaled_dot_product_attention, "spread", None) or Alone(x.size(1))
        tiling = Tiling.of(spread.tokens(), spread.rank, max(1, self.options.stream_tokens // x.size(0)))
        if x.size(1) != tiling.lengths[tiling.rank]:
            raise ValueError(f"rank {tiling.rank} has {x.size(1)} tokens of a sequence over ranks of {tiling.lengths}")
        away, attention = Away(tiling), SpreadAttention(spread, tiling)
        weights = [p for p in block.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (x.requires_grad or weights):
            with torch.no_grad():
                return self.forward(block, away, attention, None, x, tables)
        out: Tensor = _Block.apply(self, block, away, attention, place, tables, x, *weights)  # type: ignore[no-untyped-call]
        return out

    # ------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        block: Any,
        away: Away,
        attention: SpreadAttention,
        place: Place | None,
        x: Tensor,
        tables: Sequence[Tensor],
    ) -> Tensor:
        """place: None where nothing is to be stored."""
        leaving = _Leaving(self, away, place, x) if place else None
        tiles = away.tiling.tiles
        keys = attention.keys(block.keys(x[:, tile], *_cut(tables, tile)) for tile in tiles)
        out = torch.empty_like(x)
        for number, tile in enumerate(tiles):
            made: list[Tensor] = []

            def attend(q: Tensor, made: list[Tensor] = made, number: int = number) -> Tensor:
                found, *to_store = attention.attend(q, keys, number)
                made.extend(to_store)
                return found

            out[:, tile] = block.tile(x[:, tile], *_cut(tables, tile), attend)
            if leaving:
                leaving.leave(number, *made)
        if leaving:
            leaving.end()
        return out

    # ------------------------------------------------------------------------------------------------ backward

    def backward(
        self,
        block: Any,
        away: Away,
        attention: SpreadAttention,
        tables: Sequence[Tensor],
        grad: Tensor,
        wants_x: bool,
        sums: WeightSums,
    ) -> Tensor | None:
        """The gradient of x, if it is wanted; those of the weights are added to `sums`."""
        arriving, tiles = self._arrive(away), away.tiling.tiles
        keys = attention.keys(block.keys(next(arriving)[0], *_cut(tables, tile)) for tile in tiles)
        grads: list[Keys | None] = [None] * len(keys)
        grad_x = torch.empty_like(grad) if wants_x else None
        for number, tile in reversed(list(enumerate(tiles))):
            x, *stored = next(arriving)
            x = x.detach().requires_grad_(wants_x)
            attend = partial(
                attention.attended, number=number, keys=keys, grads=grads, stored=stored, anchor=sums.anchor
            )
            with torch.enable_grad():
                out = block.tile(x, *_cut(tables, tile), attend)
            found = sums.add(x, [out], [grad[:, tile]])
            if grad_x is not None:
                assert found is not None
                grad_x[:, tile] = found
            del out, stored, attend, found
        keys.clear()
        for number, tile in enumerate(tiles):
            x = next(arriving)[0].detach().requires_grad_(wants_x)
            with torch.enable_grad():
                own = block.keys(x, *_cut(tables, tile))
            more = sums.add(x, own, attention.grads(grads, number, own))
            if grad_x is not None and more is not None:
                grad_x[:, tile] += more
        next(arriving, None)
        return grad_x

    def _arrive(self, away: Away) -> Iterator[list[Tensor]]:
        """On the device, until the next is asked for: x of each tile from the first to the last, then all that is
        stored of each from the last to the first, then x again. One comes while another is used."""
        lease = away.lease
        if lease is None or lease.slot is None:
            raise RuntimeError(
                f"a graph is gone through once with offload.activations.mode={self.options.mode}; set it to swap to do "
                "so again"
            )
        slot = self.pools.brought(lease.slot)
        forth = [(number, 1) for number in range(len(away.tiling.tiles))]
        order = [*forth, *((number, len(away.fields)) for number, _ in reversed(forth)), *forth]
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
        self, away: Away, lease: Lease, slot: Memory, number: int, num_fields: int
    ) -> tuple[Memory, Event, list[Tensor]]:
        size_bytes = away.tile_bytes(number, num_fields)
        buffer = self.pools.take_buffer(size_bytes, away.whole_tile_bytes())
        wait(self.device, self.into, lease.left, buffer.free)
        with on(self.into):
            buffer.data[:size_bytes].copy_(away.in_slot(slot.data, number)[:size_bytes], non_blocking=True)
        return buffer, mark(self.device, self.into), away.views(buffer.data, number, num_fields)

    def _arrived(self, _: Memory, arrived: Event, views: list[Tensor]) -> list[Tensor]:
        wait(self.device, None, arrived)
        return views


class _Leaving:
    """What a forward copies out, tile by tile."""

    def __init__(self, streaming: Streaming, away: Away, place: Place, x: Tensor) -> None:
        self._s, self._away, self._place, self._x = streaming, away, place, x
        self._slot: Memory | None = None
        self._flying: deque[tuple[Event, list[Tensor]]] = deque()

    def leave(self, number: int, *made: Tensor) -> None:
        """made: attention's output (B, T', H', E) and log-sum-exp (B, H', T') of tile `number`."""
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
        size_bytes = self._away.bytes()
        lease.slot = s.pools.pass_on(self._slot, size_bytes, lease.left, self._place.number, self._place.num)

    def _take(self, made: Sequence[Tensor]) -> Memory:
        """The slot, once it is known what is stored; all of x goes there."""
        s, away, x, place = self._s, self._away, self._x, self._place
        away.fields = [Field.of(x, 1)]
        if s.stores_attention:
            away.fields += [Field.of(made[0], 1, of_all=True), Field.of(made[1], 2, of_all=True)]
        slot = self._slot = s.pools.take_slot(away.bytes(), place.num, away.bytes(place.growth))
        away.lease = Lease(slot, None)
        weakref.finalize(away, s.ended, away.lease).atexit = False
        wait(s.device, s.out, mark(s.device, None), slot.free)
        with on(s.out):
            for number, tile in enumerate(away.tiling.tiles):
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
        away: Away,
        attention: SpreadAttention,
        place: Place,
        tables: Sequence[Tensor],
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.streaming, ctx.given = streaming, (block, away, attention, tables)
        ctx.save_for_backward(*weights)  # so that whoever shards them has them there in the backward
        return streaming.forward(block, away, attention, place, x, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        sums = WeightSums([p for p in ctx.given[0].parameters() if p.requires_grad])
        grad_x = ctx.streaming.backward(*ctx.given, grad, ctx.needs_input_grad[6], sums)
        return None, None, None, None, None, None, grad_x, *sums.totals()


def _cut(tables: Sequence[Tensor], tile: slice) -> list[Tensor]:
    return [table[tile] for table in tables]
