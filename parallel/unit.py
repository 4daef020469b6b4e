"""A unit: parameters that are gathered, computed and released together, and this rank's ranges of their state.

A unit has up to three flat buffers: of the parameters that train and may be quantized, of the others that train, and of
the frozen ones. Of the whole buffer

- `Flat.shard` holds the parameter range (P), always, in the compute dtype or packed ([Note: quantized weights]); after
  an update it is refreshed from the ranks that own it (`TrainableFlat.refresh`).
- `Flat.full` holds all of it while the unit is gathered. The model's parameters are views of it.
- `TrainableFlat.master` and `moments` hold the optimizer's range (O) in fp32; `grad` the gradient range (G) while
  micro-batches accumulate and the optimizer's range once they are reduced. In fp32 compute `master` is part of `shard`,
  unless weights are quantized.
"""

from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor, nn

from offload.shard import Shard, Update
from offload.slots_on_drives import Arrival
from offload.state import Fill, Piece
from parallel.collectives import WHEN_FINISHED, BufferPool, Chain, Step, Steps, all_gather, all_reduce
from parallel.layout import ALIGN, Layout
from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.quantize import dequantize, quantize
from parallel.transport import Hop, Transport, replicate_sum, scatter_sum

Named = Sequence[tuple[str, nn.Parameter]]
Fetch = Callable[[], Arrival]
"""Has a parameter shard loaded from drives."""
RESIDUAL = "residual"
"""Kind of state of what error feedback carries from one step to the next."""


def without_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One NaN seen as the whole shape: a released parameter keeps its shape, and what reads it by mistake shows."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


class Flat:
    """One flat buffer: its layout, this rank's parameter range, and the gathered weights while there are any."""

    def __init__(
        self,
        named: Named,
        mesh: Mesh,
        placement: Placement,
        dtype: torch.dtype,
        device: torch.device,
        block: int = ALIGN,
    ) -> None:
        self.mesh, self.placement, self.dtype = mesh, placement, dtype
        self.parameters = [parameter for _, parameter in named]
        self.layout = Layout(named, mesh.world, block)
        self.start, self.stop = mesh.shard(self.layout.size, placement.params)
        self.device = device
        self.shard: Tensor
        self.fetch: Fetch | None = None
        """How the parameter shard comes from drives, if it lies there; there is no `shard` then."""
        self.streamed = False
        """Whether `shard` is in host memory or on drives, and a gather begins by bringing it to the device."""
        self.holds_gradient = False
        """Whether a gradient has left, and may lie where the weights in host memory were: until `step`."""
        self.sharded = mesh.group(mesh.num_levels - placement.params, mesh.num_levels) is not None
        """Whether the weights have to be gathered to be used."""
        self.full: Tensor | None = None
        self.gathering: Chain | None = None
        self.refreshing: Chain | None = None
        self._released = [without_memory(e.shape, dtype, device) for e in self.layout.entries]

    @property
    def shard_numel(self) -> int:
        """Elements of `shard`, of `shard_dtype`."""
        return self.stop - self.start

    @property
    def shard_dtype(self) -> torch.dtype:
        return self.dtype

    def place(self, shard: Tensor | Fetch | None) -> None:
        """Give the parameter shard its memory: `shard`, in host memory or on drives, or new memory on the device."""
        self.streamed = shard is not None
        self.sharded = self.sharded or self.streamed
        if shard is None:
            self.shard = torch.zeros(self.shard_numel, dtype=self.shard_dtype, device=self.device)
        elif isinstance(shard, Tensor):
            self.shard = shard
        else:
            self.fetch = shard
        if self.sharded:
            self.release()
        else:
            self.attach(self.shard)

    def attach(self, full: Tensor) -> None:
        """Make the parameters views of `full`."""
        self.full = full
        for parameter, view in zip(self.parameters, self.layout.views(full), strict=True):
            parameter.data = view

    def release(self) -> None:
        """Take the parameters' memory away."""
        self.full = None
        for parameter, released in zip(self.parameters, self._released, strict=True):
            parameter.data = released

    def gather(self, out: Tensor, scratch: BufferPool) -> Steps:
        """All-gather the parameter shards into `out`, the slowest level first: it then carries the least."""
        shard = yield from self._arrive(out[self.start : self.stop])
        yield from self._gather_exact(shard, out, self.mesh.num_levels - self.placement.params)

    def _gather_exact(self, source: Tensor, out: Tensor, first: int) -> Steps:
        """All-gather `source`, this rank's range inside the level before `first`, over the levels from there on."""
        arrived = yield from self._spread(source, first, self.mesh.num_levels, lambda start, stop: out[start:stop])
        if arrived is source and not self.streamed:  # every level has one member
            out.copy_(source)

    def _spread(
        self, source: Tensor, first: int, last: int, place: Callable[[int, int], Tensor]
    ) -> Generator[Step, None, Tensor]:
        """All-gather `source` over the levels ``first:last``, the slowest first, each into ``place(start, stop)`` for
        elements ``start:stop`` of the flat buffer. Returns what arrived last."""
        for level in range(first, last):
            if group := self.mesh.group(level, level + 1):
                target = place(*self.mesh.shard(self.layout.size, self.mesh.num_levels - 1 - level))
                yield from all_gather(target, source, group)
                source = target
        return source

    def finish_gather(self) -> None:
        """Have the gathered weights in place, if they are on their way."""
        if self.gathering:
            self.gathering.finish()
            self.gathering = None

    def finish_refresh(self) -> None:
        """Have the new weights in the shard, if they are on their way."""
        if self.refreshing:
            self.refreshing.finish()
            self.refreshing = None

    def _arrive(self, place: Tensor) -> Generator[Step, None, Tensor]:
        """The shard on the device: itself, or brought to `place` from host memory or drives."""
        if self.fetch is None:
            return place.copy_(self.shard, non_blocking=True) if self.streamed else self.shard
        arrival = self.fetch()
        yield WHEN_FINISHED
        arrival.into(place)
        return place

    def pieces(self, kind: str, tensor: Tensor, start: int) -> Iterator[Piece]:
        """What this rank checkpoints of elements `start` and following of the flat buffer: replicas share the work,
        each an equal part of their common range."""
        low, high = self.mesh.shard(self.layout.size, self.mesh.num_levels)
        low, high = max(low, start), min(high, start + tensor.numel())
        yield from self.named(kind, tensor[low - start : max(low, high) - start], low)

    def named(self, kind: str, tensor: Tensor, start: int) -> Iterator[Piece]:
        """Elements `start` and following of the flat buffer, by parameter."""
        for o in self.layout.overlaps(start, start + tensor.numel()):
            yield Piece(
                name=o.entry.name,
                kind=kind,
                start=o.start,
                stop=o.stop,
                shape=tuple(o.entry.shape),
                tensor=o.of(tensor),
            )


class TrainableFlat(Flat):
    """A flat buffer with gradients, fp32 master weights and optimizer state."""

    def __init__(
        self,
        named: Named,
        mesh: Mesh,
        placement: Placement,
        dtype: torch.dtype,
        device: torch.device,
        *,
        reduce_dtype: torch.dtype,
        transport: Transport | None = None,
    ) -> None:
        """transport: in which format each level carries it; None: exact on all."""
        levels = mesh.num_levels
        self.reduce_dtype, self.transport = reduce_dtype, transport
        route = range(levels - placement.optim, levels)
        quantized = [level for level in route if transport and transport.weights[level]]
        self._packed_until = max(quantized, default=-1)
        """The innermost level that weights cross packed; -1 for none."""
        self._format = transport.weights[self._packed_until] if transport and quantized else None
        super().__init__(named, mesh, placement, dtype, device, transport.block if transport else ALIGN)
        self.optim_start, self.optim_stop = mesh.shard(self.layout.size, placement.optim)
        self.chunk = self.optim_stop - self.optim_start
        """Elements of this rank's optimizer range."""
        self.packed: Tensor | None = None
        """This rank's optimizer range, packed; part of `shard` where that is packed."""
        self.owned: Tensor | None = None
        """The part of `shard` that this rank's optimizer writes; None where the weights are packed afterwards, or come
        from the slot of `away` by a refresh."""
        self.master: Tensor
        """fp32, and as large each of `moments`; none of them where the states are `away`."""
        self.moments: dict[str, Tensor] = {}
        self.away: Shard | None = None
        self.updating: Update | None = None
        self.squares: Tensor | None = None
        """0-dim: the sum of squares of a gradient that has left for the slot of `away`."""
        self.residuals: dict[int, Tensor] = {}
        """By level, what quantization took from the gradients sent there: the error feedback, fp32."""
        if transport and transport.error_feedback:
            for level in reversed(range(levels)):
                if transport.grads[level]:
                    start, stop = mesh.shard(self.layout.size, levels - 1 - level)
                    self.residuals[level] = torch.zeros(stop - start, device=device)
        self.grad: Tensor | None = None
        self.scatters = mesh.group(levels - placement.grads, levels) is not None
        """Whether gradients leave this rank after every micro-batch."""
        self.alone = mesh.group(0, levels) is None
        self.received = [False] * len(self.parameters)
        """Which parameters got a gradient in this step."""

    @property
    def _packed_shard(self) -> bool:
        return self._packed_until >= self.mesh.num_levels - self.placement.params

    @property
    def refreshes(self) -> bool:
        """Whether others update part of this rank's parameter shard, or it is to be dequantized."""
        mesh, placement = self.mesh, self.placement
        others = mesh.group(mesh.num_levels - placement.optim, mesh.num_levels - placement.params) is not None
        return others or (self._format is not None and not self._packed_shard)

    # ------------------------------------------------------------------------------------------------ memory

    @property
    def shard_numel(self) -> int:
        return self._packed_bytes(self.stop - self.start) if self._packed_shard else super().shard_numel

    @property
    def shard_dtype(self) -> torch.dtype:
        return torch.uint8 if self._packed_shard else self.dtype

    @property
    def slot_dtype(self) -> torch.dtype:
        """In which gradients leave for, and weights come back from, states that are away."""
        return torch.float32 if self._format else self.dtype

    @property
    def weights_direct(self) -> bool:
        """Whether an update away from the device writes what is computed with; else `publish` packs it."""
        return self._format is None

    @property
    def states_are_own(self) -> bool:
        """Whether no replica has the same optimizer range: this rank checkpoints all of it."""
        return self.mesh.shard(self.layout.size, self.mesh.num_levels) == (self.optim_start, self.optim_stop)

    @property
    def slot_is_shard(self) -> bool:
        """Whether, in host memory, one place can serve as the slot and as the parameter shard."""
        return self._format is None and (self.start, self.stop) == (self.optim_start, self.optim_stop)

    def place(self, shard: Tensor | Fetch | None) -> None:
        super().place(shard)
        if self._format and self._packed_shard:
            self.packed = self._packed_place(self.shard, self.start)(self.optim_start, self.optim_stop)
        elif self._format:
            self.packed = torch.zeros(self._packed_bytes(self.chunk), dtype=torch.uint8, device=self.device)
        elif not self.streamed:
            self.owned = self.shard[self.optim_start - self.start : self.optim_stop - self.start]

    def place_states(self, kinds: Sequence[str], away: Shard | None) -> None:
        """Give the optimizer states their memory: on the device, or what `away` has. After `place`."""
        self.away = away
        if away:
            away.target = self.owned
            return
        shares = self.owned is not None and self.dtype == torch.float32
        self.master = self.owned if shares and self.owned is not None else torch.zeros(self.chunk, device=self.device)
        self.moments = {kind: torch.zeros_like(self.master) for kind in kinds}

    # ------------------------------------------------------------------------------------------------ weights

    def _packed_bytes(self, numel: int) -> int:
        """Of whole optimizer ranges, each packed for itself."""
        assert self._format is not None
        return numel // self.chunk * self._format.packed_bytes(self.chunk)

    def _packed_place(self, packed: Tensor, origin: int) -> Callable[[int, int], Tensor]:
        """Where elements ``start:stop`` of the flat buffer lie in `packed`, whose first one is `origin`."""
        return lambda start, stop: packed[self._packed_bytes(start - origin) : self._packed_bytes(stop - origin)]

    def publish(self) -> None:
        """After the master weights changed, and before the `refresh` that carries them on: pack what travels packed."""
        if self.packed is None:
            return
        assert self._format is not None
        master = self.away.weight.to(self.device, non_blocking=True) if self.away else self.master
        if self.packed.device == master.device:
            quantize(master, self._format, self.packed)
        else:
            packed = torch.empty(self.packed.numel(), dtype=torch.uint8, device=self.device)
            quantize(master, self._format, packed)
            self.packed.copy_(packed)

    def refresh(self, scratch: BufferPool) -> Steps:
        """All-gather the updated weights from the ranks of O into the parameter shards, the slowest level first."""
        first, last = self.mesh.num_levels - self.placement.optim, self.mesh.num_levels - self.placement.params
        shard = scratch.take(self.shard_numel, self.shard_dtype) if self.streamed else self.shard

        def place(start: int, stop: int) -> Tensor:
            return shard[start - self.start : stop - self.start]

        if self._packed_shard:
            packed_place = self._packed_place(shard, self.start)
            source = packed_place(self.optim_start, self.optim_stop)
            if self.streamed:
                assert self.packed is not None
                source.copy_(self.packed, non_blocking=True)
            yield from self._spread(source, first, last, packed_place)
        elif self.packed is not None:
            target = yield from self._unpack(self.packed, first, place, scratch)
            yield from self._spread(target, self._packed_until + 1, last, place)
        else:
            source = place(self.optim_start, self.optim_stop)
            if self.streamed:
                assert self.away is not None
                source.copy_(self.away.weight, non_blocking=True)
            yield from self._spread(source, first, last, place)
        if self.streamed:
            self.shard.copy_(shard, non_blocking=True)
            scratch.give(shard)

    def gather(self, out: Tensor, scratch: BufferPool) -> Steps:
        first = self.mesh.num_levels - self.placement.params
        if not self._packed_shard:
            shard = yield from self._arrive(out[self.start : self.stop])
            yield from self._gather_exact(shard, out, first)
        else:
            place = scratch.take(self.shard_numel, torch.uint8) if self.streamed else self.shard
            shard = yield from self._arrive(place)
            target = yield from self._unpack(shard, first, lambda start, stop: out[start:stop], scratch)
            if self.streamed:
                scratch.give(place)
            yield from self._spread(
                target, self._packed_until + 1, self.mesh.num_levels, lambda start, stop: out[start:stop]
            )

    def _unpack(
        self, source: Tensor, first: int, place: Callable[[int, int], Tensor], scratch: BufferPool
    ) -> Generator[Step, None, Tensor]:
        """All-gather `source` packed, from level `first` through the last quantized one, and dequantize what arrived to
        its place, which is returned."""
        assert self._format is not None
        start, stop = self.mesh.shard(self.layout.size, self.mesh.num_levels - 1 - self._packed_until)
        buffer = scratch.take(self._packed_bytes(stop - start), torch.uint8)
        packed = yield from self._spread(source, first, self._packed_until + 1, self._packed_place(buffer, start))
        target = place(start, stop)
        dequantize(packed, self._format, target, chunks=(stop - start) // self.chunk)
        scratch.give(buffer)
        return target

    # ------------------------------------------------------------------------------------------------ gradients

    def collect(self, into: Tensor, *, add: bool) -> None:
        """Move the parameters' gradients into a whole flat buffer."""
        if self.layout.has_gaps and not add:
            into.zero_()
        for i, (parameter, view) in enumerate(zip(self.parameters, self.layout.views(into), strict=True)):
            if parameter.grad is not None:
                (view.add_ if add else view.copy_)(parameter.grad)
                parameter.grad = None
                self.received[i] = True
            elif not add:
                view.zero_()

    def accumulate(self, *, first: bool, last: bool) -> None:
        """Collect gradients that no rank shares yet: into `grad`, over the whole buffer."""
        if first:
            dtype = torch.float32 if not last else self.dtype if self.alone else self.reduce_dtype
            self.grad = torch.empty(self.layout.size, dtype=dtype, device=self.device)
        assert self.grad is not None
        self.collect(self.grad, add=not first)

    def reduce_inner(self, flat: Tensor, scratch: BufferPool, *, first: bool, last: bool) -> Steps:
        """Reduce-scatter a micro-batch's gradients over the levels of G, fastest first, and add them to `grad`."""
        levels = self.mesh.num_levels
        piece = yield from scatter_sum(
            flat, self._hops(levels - self.placement.grads, levels), self.reduce_dtype, scratch
        )
        if not first:
            assert self.grad is not None
            self.grad.add_(piece)
        else:  # further micro-batches are added in fp32
            dtype = self.reduce_dtype if last else torch.float32
            self.grad = piece.to(dtype, copy=piece is flat)
        if last:
            yield from self.reduce_outer(scratch)

    def reduce_outer(self, scratch: BufferPool) -> Steps:
        """After the last micro-batch: reduce-scatter `grad` over O outside G, and sum it over the replicas."""
        assert self.grad is not None
        if self.grad.is_cuda:  # made on the compute stream, which may hand the memory out again when we let it go
            self.grad.record_stream(torch.cuda.current_stream())
        replicas = self.mesh.num_levels - self.placement.optim
        hops = self._hops(replicas, self.mesh.num_levels - self.placement.grads)
        piece = yield from scatter_sum(self.grad, hops, self.reduce_dtype, scratch)
        hops = self._hops(0, replicas)
        if any(hop.format for hop in hops):
            piece = yield from replicate_sum(piece, hops, scratch)
        elif group := self.mesh.group(0, replicas):
            piece = piece.to(self.reduce_dtype)
            yield from all_reduce(piece, group)
        self.grad = piece

    def _hops(self, first: int, last: int) -> list[Hop]:
        """The levels ``first:last`` of more than one member, the fastest first."""
        transport, hops = self.transport, []
        for level in reversed(range(first, last)):
            if group := self.mesh.group(level, level + 1):
                hops.append(Hop(group, transport.grads[level] if transport else None, self.residuals.get(level)))
        return hops

    # ------------------------------------------------------------------------------------------------ state

    def residual_pieces(self) -> Iterator[Piece]:
        for name, residual in self._named_residuals():
            length = residual.numel()
            yield Piece(name=name, kind=RESIDUAL, start=0, stop=length, shape=(length,), tensor=residual)

    def load_residuals(self, fill: Fill) -> None:
        """The error feedback belongs to one mesh: on another it starts again from nothing."""
        for piece in self.residual_pieces():
            try:
                fill([piece])
            except KeyError:
                piece.tensor.zero_()

    def loaded(self) -> None:
        """After the master weights were filled: bring the weights to where an update would; `refresh` must follow."""
        if self.away:
            if self.owned is not None:
                self.owned.copy_(self.away.weight)
        elif self.owned is not None and self.owned is not self.master:
            self.owned.copy_(self.master)
        self.publish()

    def _named_residuals(self) -> Iterator[tuple[str, Tensor]]:
        """Each rank's are its own, so rank and mesh are part of the name."""
        mesh = "x".join(map(str, self.mesh.sizes))
        for level, residual in self.residuals.items():
            yield (
                f"{self.layout.entries[0].name}.{mesh}.level{level}.of{residual.numel()}.rank{self.mesh.rank}",
                residual,
            )


class Unit:
    """A module and its flat buffers."""

    def __init__(self, name: str, module: nn.Module, trainable: Sequence[TrainableFlat], frozen: Flat | None) -> None:
        self.name, self.module = name, module
        self.trainable, self.frozen = tuple(trainable), frozen
        self.flats: list[Flat] = [*trainable, *([frozen] if frozen else [])]
        self.num_trainable = sum(len(flat.parameters) for flat in trainable)
        self.num_pending = 0
        """Parameters whose gradient this backward has not brought yet."""
        self.packed = False
        """Whether the backward will ask for this unit's weights."""

    @property
    def sharded(self) -> bool:
        """Whether it is gathered to be used, and released after. Once its flats have their place."""
        return any(flat.sharded for flat in self.flats)

    @property
    def waits(self) -> bool:
        """Whether new weights may be on their way when it is to be used."""
        return any(flat.refreshes or flat.away for flat in self.trainable)
