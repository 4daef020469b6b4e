"""A unit: parameters that are gathered, computed and released together, and this rank's ranges of their state.

A unit has at most two flat buffers, one of the parameters that train and one of the frozen ones. Of the whole buffer

- `Flat.shard` holds the parameter range (P) in the compute dtype, always; after an update it is refreshed from the
  ranks that own it (`TrainableFlat.refresh`).
- `Flat.full` holds all of it while the unit is gathered. The model's parameters are views of it.
- `TrainableFlat.master` and `moments` hold the optimizer's range (O) in fp32; `grad` the gradient range (G) while
  micro-batches accumulate and the optimizer's range once they are reduced. In fp32 compute `master` is part of `shard`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from offload.state import MASTER, Piece, Read
from parallel.collectives import Chain, Steps, all_gather, all_reduce, reduce_scatter
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.placement import Placement

Named = Sequence[tuple[str, nn.Parameter]]


def without_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One NaN seen as the whole shape: a released parameter keeps its shape, and what reads it by mistake shows."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


class Flat:
    """One flat buffer: its layout, this rank's parameter range, and the gathered weights while there are any."""

    def __init__(
        self, named: Named, mesh: Mesh, placement: Placement, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.mesh, self.placement = mesh, placement
        self.parameters = [parameter for _, parameter in named]
        self.layout = Layout(named, mesh.world)
        self.start, self.stop = mesh.shard(self.layout.size, placement.params)
        self.shard = torch.zeros(self.stop - self.start, dtype=dtype, device=device)
        self.sharded = mesh.group(mesh.num_levels - placement.params, mesh.num_levels) is not None
        self.full: Tensor | None = None
        self.gathering: Chain | None = None
        self.refreshing: Chain | None = None
        self._released = [without_memory(e.shape, dtype, device) for e in self.layout.entries]
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

    def gather(self, out: Tensor) -> Steps:
        """All-gather the parameter shards into `out`, the slowest level first: it then carries the least."""
        mesh, source = self.mesh, self.shard
        for level in range(mesh.num_levels - self.placement.params, mesh.num_levels):
            if group := mesh.group(level, level + 1):
                start, stop = mesh.shard(self.layout.size, mesh.num_levels - 1 - level)
                target = out[start:stop]
                yield from all_gather(target, source, group)
                source = target
        if source is self.shard:  # every level has one member
            out.copy_(source)

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

    def pieces(self) -> Iterator[Piece]:
        """What this rank checkpoints: replicas share the work, each an equal part of the common range."""
        yield from self._pieces(MASTER, self.shard, self.start)

    def load(self, read: Read, *, moments: bool) -> None:
        """Fill the weights from `read`."""
        self._load(MASTER, self.shard, self.start, read)

    def _pieces(self, kind: str, tensor: Tensor, start: int) -> Iterator[Piece]:
        low, high = self.mesh.shard(self.layout.size, self.mesh.num_levels)
        part = tensor[low - start : high - start]
        for o in self.layout.overlaps(low, high):
            yield Piece(
                name=o.entry.name, kind=kind, start=o.start, stop=o.stop, shape=tuple(o.entry.shape), tensor=o.of(part)
            )

    def _load(self, kind: str, tensor: Tensor, start: int, read: Read) -> None:
        for o in self.layout.overlaps(start, start + tensor.numel()):
            o.of(tensor).copy_(read(o.entry.name, kind, o.start, o.stop))


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
        kinds: Sequence[str],
        reduce_dtype: torch.dtype,
    ) -> None:
        super().__init__(named, mesh, placement, dtype, device)
        self.reduce_dtype = reduce_dtype
        self.optim_start, self.optim_stop = mesh.shard(self.layout.size, placement.optim)
        self.owned = self.shard[self.optim_start - self.start : self.optim_stop - self.start]
        """The part of `shard` that this rank updates."""
        self.master = self.owned if dtype == torch.float32 else torch.zeros_like(self.owned, dtype=torch.float32)
        self.moments = {kind: torch.zeros_like(self.master) for kind in kinds}
        self.grad: Tensor | None = None
        self.scatters = mesh.group(mesh.num_levels - placement.grads, mesh.num_levels) is not None
        """Whether gradients leave this rank after every micro-batch."""
        self.alone = mesh.group(0, mesh.num_levels) is None
        self.received = [False] * len(self.parameters)
        """Which parameters got a gradient in this step."""

    @property
    def refreshes(self) -> bool:
        """Whether others update part of this rank's parameter shard."""
        mesh, placement = self.mesh, self.placement
        return mesh.group(mesh.num_levels - placement.optim, mesh.num_levels - placement.params) is not None

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
            dtype = torch.float32 if not last else self.shard.dtype if self.alone else self.reduce_dtype
            self.grad = torch.empty(self.layout.size, dtype=dtype, device=self.shard.device)
        assert self.grad is not None
        self.collect(self.grad, add=not first)

    def reduce_inner(self, flat: Tensor, *, first: bool, last: bool) -> Steps:
        """Reduce-scatter a micro-batch's gradients over the levels of G, fastest first, and add them to `grad`."""
        levels, piece = self.mesh.num_levels, flat
        for level in range(levels - 1, levels - 1 - self.placement.grads, -1):
            if group := self.mesh.group(level, level + 1):
                piece = yield from reduce_scatter(piece, group)
        if not first:
            assert self.grad is not None
            self.grad.add_(piece)
        else:  # further micro-batches are added in fp32
            dtype = self.reduce_dtype if last else torch.float32
            self.grad = piece.to(dtype, copy=piece is flat)
        if last:
            yield from self.reduce_outer()

    def reduce_outer(self) -> Steps:
        """After the last micro-batch: reduce-scatter `grad` over O outside G, and sum it over the replicas."""
        assert self.grad is not None
        if self.grad.is_cuda:  # made on the compute stream, which may hand the memory out again when we let it go
            self.grad.record_stream(torch.cuda.current_stream())
        levels, piece = self.mesh.num_levels, self.grad.to(self.reduce_dtype)
        for level in range(levels - 1 - self.placement.grads, levels - 1 - self.placement.optim, -1):
            if group := self.mesh.group(level, level + 1):
                piece = yield from reduce_scatter(piece, group)
        if group := self.mesh.group(0, levels - self.placement.optim):
            yield from all_reduce(piece, group)
        self.grad = piece

    def refresh(self) -> Steps:
        """All-gather the updated weights from the ranks of O into the parameter shards, the slowest level first."""
        mesh, source = self.mesh, self.owned
        for level in range(mesh.num_levels - self.placement.optim, mesh.num_levels - self.placement.params):
            if group := mesh.group(level, level + 1):
                start, stop = mesh.shard(self.layout.size, mesh.num_levels - 1 - level)
                target = self.shard[start - self.start : stop - self.start]
                yield from all_gather(target, source, group)
                source = target

    def pieces(self) -> Iterator[Piece]:
        for kind, tensor in {MASTER: self.master, **self.moments}.items():
            yield from self._pieces(kind, tensor, self.optim_start)

    def load(self, read: Read, *, moments: bool) -> None:
        """Fill the master weights, and the optimizer's state if `moments`; `refresh` must follow."""
        for kind, tensor in {MASTER: self.master, **(self.moments if moments else {})}.items():
            self._load(kind, tensor, self.optim_start, read)
        if self.master is not self.owned:
            self.owned.copy_(self.master)


class Unit:
    """A module and its one or two flat buffers."""

    def __init__(self, name: str, module: nn.Module, trainable: TrainableFlat | None, frozen: Flat | None) -> None:
        self.name, self.module = name, module
        self.trainable, self.frozen = trainable, frozen
        self.flats: list[Flat] = [flat for flat in (trainable, frozen) if flat is not None]
        self.sharded = any(flat.sharded for flat in self.flats)
        self.num_pending = 0
        """Parameters whose gradient this backward has not brought yet."""
        self.packed = False
        """Whether the backward will ask for this unit's weights."""

    @property
    def gathered(self) -> bool:
        return all(flat.full is not None for flat in self.flats)
