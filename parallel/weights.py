"""Where units' weights are while they are computed with, and how new ones come there.

[Note: who may use a unit's weights, and when]
Gathered weights lie in buffers that are used again for the next unit. Autograd must therefore not hold on to them:
saved-tensor hooks turn a saved weight into a `_Handle` that finds the weights again in the backward, gathering them if
need be. A unit is released when its forward ends (but the last one, whose backward follows at once), and again when the
gradients of all its parameters are there. The root unit (parameters outside all units or shared by several) stays
gathered from the start of the forward to the end of the backward.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from offload.weak import weakly
from parallel.collectives import BufferPool, Lane
from parallel.offloaded import Offloader
from parallel.unit import Flat, TrainableFlat, Unit


@dataclass(frozen=True)
class _Handle:
    """What autograd keeps instead of a weight, see [Note: who may use a unit's weights, and when]."""

    unit: Unit
    flat: Flat
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Weights:
    """Gathers and releases the weights of units, and refreshes their shards, on a lane of its own."""

    def __init__(self, units: Sequence[Unit], offloader: Offloader, device: torch.device, *, overlap: bool) -> None:
        self._units, self._offloader = units, offloader
        self._slots = BufferPool(device)
        self._lane = Lane(device, overlap=overlap)
        self._owners: dict[int, tuple[Unit, Flat]] = {}  # storage of gathered weights -> whose they are
        self._keeps, self.pack, self.unpack = weakly(self._keep), weakly(self._pack), weakly(self._unpack)
        """What is to be kept of a tensor that autograd saves, itself where it is no weight, and that tensor again, its
        unit gathered."""

    @property
    def size_bytes(self) -> int:
        """Of the buffers, and of what gathers and refreshes need between their steps."""
        return self._slots.size_bytes + self._lane.scratch.size_bytes

    def use(self, unit: Unit) -> None:
        """Have the unit's weights in place for what this thread or stream does next."""
        self.start_gather(unit)
        for flat in unit.flats:
            flat.finish_gather()

    def start_gather(self, unit: Unit) -> None:
        """Start bringing the unit's weights into buffers, those of its last update, unless they are there."""
        for trainable in unit.trainable:
            self.finish_update(trainable)
        for flat in unit.flats:
            if flat.full is None:
                if flat.streamed and flat.holds_gradient:
                    raise RuntimeError(
                        "with offload.weights=host or nvme nothing runs between a step's last backward and step()"
                    )
                full = self._slots.take(flat.layout.size, flat.dtype)
                flat.gathering = self._lane.launch(flat.gather(full, self._lane.scratch))
                flat.attach(full)
                self._owners[full.untyped_storage().data_ptr()] = unit, flat

    def release(self, unit: Unit) -> None:
        """Give the unit's buffers back; what is not sharded stays."""
        for flat in unit.flats:
            if flat.sharded and flat.full is not None:
                flat.finish_gather()
                del self._owners[flat.full.untyped_storage().data_ptr()]
                self._slots.give(flat.full)
                flat.release()

    def start_refresh(self, flat: TrainableFlat) -> None:
        """Start bringing new weights to where they are used; a unit waits for its own before it computes."""
        if flat.refreshes:
            flat.refreshing = self._lane.launch(flat.refresh(self._lane.scratch))

    def finish_update(self, flat: TrainableFlat) -> None:
        """Have the weights of the last update in the parameter shard."""
        if self._offloader.arrive(flat):
            flat.publish()
            self.start_refresh(flat)
        flat.finish_refresh()

    def kept_as_handles(self) -> AbstractContextManager[Any]:
        """Around a forward: autograd keeps handles of gathered weights."""
        if not any(unit.sharded for unit in self._units):
            return nullcontext()
        return saved_tensors_hooks(self._keeps, self.unpack)

    def _keep(self, tensor: Tensor) -> Tensor | _Handle:
        """As `pack`, for autograd itself: an operator that saves its own result would hold itself by it, and all that
        comes before it, for good where no backward comes (a peer has died)."""
        kept = self._pack(tensor)
        return tensor.detach() if kept is tensor else kept

    def _pack(self, tensor: Tensor) -> Tensor | _Handle:
        owner = self._owners.get(tensor.untyped_storage().data_ptr())
        if owner is None:
            return tensor
        unit, flat = owner
        if tensor.dtype != flat.dtype:  # other bits of the same memory: a copy is the safe thing to keep
            return tensor.detach().clone()
        unit.packed = True
        return _Handle(unit, flat, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Handle) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.use(saved.unit)
        assert saved.flat.full is not None
        return saved.flat.full.as_strided(saved.size, saved.stride, saved.offset)
