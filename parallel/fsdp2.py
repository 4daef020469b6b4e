"""The same job on PyTorch's FSDP2, to compare with and to move over from.

Owns the model's conversion (`fully_shard` on each unit, then on the root), the shards' first filling and PyTorch's
optimizer over them. Master weights are fp32 shards; compute and gathers are in `dtype`. No rank ever holds the whole
model: parameters come on ``meta``, and of each a rank fills only its shard. One thread; streams are FSDP2's.

[Note: a shard is a range] FSDP2 cuts a parameter along dimension 0 into chunks of ``ceil(rows / shards)`` rows, the
last ones short or empty. Rows are contiguous: a rank's shard is one range of the flattened parameter, a `Piece`.

[Note: shared parameters] A unit that shares a parameter with another unit or with the root is not sharded by itself but
left to the root, whose parameters stay gathered from the start of forward to the end of backward.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from offload.state import MASTER, Fill, Movable, Piece, Read, filling
from parallel import foreign
from parallel.cut import lay_out_buffers, wrap_blocks
from parallel.engine import Accept
from parallel.mesh import Mesh
from parallel.optimizer import moment_kinds
from parallel.options import OptimizerOptions, ParallelOptions

_PLACEMENTS = ("ddp", "zero2", "zero3", "hsdp")
_KEEP_GATHERED = ("ddp", "zero2")
"""Placements whose weights are whole on every rank: what is gathered stays until the update."""
_REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FSDP2Engine:
    """An `Engine` over ``torch.distributed.fsdp.fully_shard``: placements ``ddp``, ``zero2``, ``zero3``, ``hsdp``."""

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        units: Sequence[nn.Module],
        initial: Read,
        optimizer: OptimizerOptions,
        options: ParallelOptions,
        dtype: torch.dtype,
        device: torch.device,
        recompute: Sequence[nn.Module] = (),
        compile: Sequence[nn.Module] = (),
    ) -> None:
        """Shard `model` in place over all ranks of the default process group (made for one process if there is none).

        Parameters are on ``meta``, of any floating dtype; buffers are real and keep their values. `initial` gives the
        first weights; `compile` and `recompute` name modules whose forward is compiled or recomputed. ValueError for a
        placement that FSDP2 does not have.
        """
        if options.placement not in _PLACEMENTS:
            raise ValueError(
                f"parallel.placement={options.placement} with engine=fsdp2: choose one of {', '.join(_PLACEMENTS)}, "
                f"or engine=native"
            )
        foreign.single_process_group(device)
        self.model = model
        self._dtype, self._options = dtype, optimizer
        self._keeps_gathered = options.placement in _KEEP_GATHERED
        self._mesh = _mesh(options, device)
        wrap_blocks(recompute=recompute, compile=compile)
        lay_out_buffers(model)
        for param in model.parameters():
            param.data = param.data.float()
        self._modules = _fully_shard(model, units, self._mesh, options, dtype)
        _materialize(model, device)
        self._params = dict(model.named_parameters())
        self._trained = [param for param in self._params.values() if param.requires_grad]
        self._optimizer = foreign.build_optimizer(foreign.decay_groups(self._trained, optimizer), optimizer)
        foreign.start_state(self._optimizer, self._trained, optimizer)
        self._updates = 0
        self.load(filling(initial), moments=False)

    @property
    def updates(self) -> int:
        """Updates made so far. Set it after loading moments: AdamW's bias correction depends on it."""
        return self._updates

    @updates.setter
    def updates(self, updates: int) -> None:
        self._updates = updates
        foreign.set_updates(self._optimizer, updates)

    def forward_backward(self, *inputs: Any, scale: float, first: bool, last: bool) -> Tensor:
        """See `Engine`. Gradients are reduced after each micro-batch, but between replicas only after the last."""
        root = self._modules[0]
        root.set_requires_all_reduce(last)
        root.set_reshard_after_backward(last or not self._keeps_gathered)
        loss: Tensor = self.model(*inputs)
        (loss * scale).backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, *inputs: Any) -> Tensor:
        """See `Engine`."""
        output: Tensor = self.model(*inputs)
        # Without a backward nobody gives back what was gathered, and a later update would not reach it.
        for module in self._modules:
            module.reshard()
        return output

    def expect(self, lr: float) -> None:
        """See `Engine`. Nothing begins before `step`."""

    def step(self, lr: float, clip_norm: float | None, accept: Accept | None = None) -> Tensor:
        """See `Engine`. A parameter that got no gradient is not touched, as in plain PyTorch."""
        norm = get_total_norm([param.grad for param in self._trained if param.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if accept is not None and not accept(whole):
            self._optimizer.zero_grad()
            return whole
        if clip_norm is not None:
            clip_grads_with_norm_(self._trained, clip_norm, norm)
        foreign.set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._updates += 1
        return whole

    def pieces(self) -> Iterator[Piece]:
        """See `Engine`. The replicas of a shard write an equal part of it each."""
        replicas = self._mesh.size(0) if self._mesh.ndim == 2 else 1
        replica = self._mesh.get_local_rank(0) if self._mesh.ndim == 2 else 0
        for name, param in self._params.items():
            start = self._start(param)
            for kind, shard in self._state(param).items():
                low, high = (shard.numel() * index // replicas for index in (replica, replica + 1))
                if low < high:
                    yield foreign.piece(name, kind, start + low, param.shape, shard[low:high])
        if dist.get_rank() == 0:
            yield from foreign.buffer_pieces(self.model)

    @torch.no_grad()
    def load(self, fill: Fill, *, moments: bool) -> None:
        """See `Engine`. Set `updates` as well."""
        fill(
            foreign.piece(name, kind, self._start(param), param.shape, shard)
            for name, param in self._params.items()
            for kind, shard in self._state(param).items()
            if moments or kind == MASTER
        )
        if moments:
            fill(foreign.buffer_pieces(self.model))

    def close(self) -> None:
        """See `Engine`. Nothing is held outside the device's memory."""

    def passing_bytes(self) -> dict[str, int]:
        return {}

    def movable(self) -> Movable:
        return Movable(extents=())

    def written_bytes_per_s(self) -> float:
        return 0.0

    def state_bytes(self) -> dict[str, int]:
        """See `Engine`. Masters are the sharded parameters too; gathered copies count as ``buffers``, at their peak."""
        moments = [self._state(param) for param in self._trained]
        whole = [sum(param.numel() for param in module.parameters()) for module in cast(list[nn.Module], self._modules)]
        root = sum(param.numel() for param in self._params.values()) - sum(whole[1:])
        gathered = sum(whole[1:]) if self._keeps_gathered else sum(sorted(whole[1:])[-2:])
        return {
            "parameters": 0,
            "gradients": foreign.size_bytes(_local(param) for param in self._trained),
            "master": foreign.size_bytes(_local(param) for param in self._params.values()),
            "optimizer": foreign.size_bytes(t for state in moments for kind, t in state.items() if kind != MASTER),
            "buffers": (root + gathered) * self._dtype.itemsize,
        }

    def _state(self, param: nn.Parameter) -> dict[str, Tensor]:
        """This rank's shard of the parameter and its moments, each a 1-D view, by kind."""
        state = {MASTER: _local(param)}
        if param.requires_grad:
            kinds = moment_kinds(self._options)
            state |= {kind: _local(self._optimizer.state[param][kind]) for kind in kinds}
        return state

    def _start(self, param: nn.Parameter) -> int:
        """First element of this rank's shard in the flattened parameter; see [Note: a shard is a range]."""
        rows = param.shape[0]
        shard_rows = math.ceil(rows / self._mesh.size(-1))
        return min(self._mesh.get_local_rank(self._mesh.ndim - 1) * shard_rows, rows) * (param.numel() // max(rows, 1))


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard, a 1-D view."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local().view(-1)


def _mesh(options: ParallelOptions, device: torch.device) -> DeviceMesh:
    """One dimension of shards, or two, replicas first: the outermost level for ``hsdp``, all ranks for ``ddp``."""
    world = dist.get_world_size()
    levels = Mesh.of(options.levels, rank=dist.get_rank(), world=world)
    if options.placement.startswith("zero") or (options.placement == "hsdp" and levels.num_levels == 1):
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    replicas = world if options.placement == "ddp" else levels.sizes[0]
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def _fully_shard(
    model: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, options: ParallelOptions, dtype: torch.dtype
) -> list[FSDPModule]:
    """Shard the units and then the root; returns the root and the units that were sharded by themselves."""
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=_REDUCE_DTYPES[options.reduce_dtype], cast_forward_inputs=False
    )
    alone = _unshared(model, units)
    for unit in alone:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=options.placement not in _KEEP_GATHERED)
    # The root's backward comes right after its forward: giving back would only gather again.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    root, *sharded = cast(list[FSDPModule], [model, *alone])
    ahead = options.prefetch_units
    for index, each in enumerate(sharded):
        each.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + ahead])
        each.set_modules_to_backward_prefetch(sharded[max(index - ahead, 0) : index][::-1])
    for each in (root, *sharded):
        # Gradients are summed, the caller's scale makes the mean. Without the second call gloo would be asked for an
        # operation (multiply, then sum) that it does not have.
        each.set_gradient_divide_factor(1.0)
        each.set_force_sum_reduction_for_comms(True)
    return [root, *sharded]


def _unshared(model: nn.Module, units: Sequence[nn.Module]) -> list[nn.Module]:
    """The units none of whose parameters is used elsewhere; see [Note: shared parameters]."""
    users: dict[nn.Parameter, int] = {}
    inside = {module for unit in units for module in unit.modules()}
    outside = [module for module in model.modules() if module not in inside]
    for params in [unit.parameters() for unit in units] + [module.parameters(recurse=False) for module in outside]:
        for param in params:
            users[param] = users.get(param, 0) + 1
    return [unit for unit in units if all(users[param] == 1 for param in unit.parameters())]


@torch.no_grad()
def _materialize(model: nn.Module, device: torch.device) -> None:
    """Give the shards memory on `device`, and keep what `to_empty` loses: values of buffers, ties of parameters."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    named = list(model.named_parameters(remove_duplicate=False))
    model.to_empty(device=device)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(buffers[name])
    first: dict[nn.Parameter, str] = {}
    for name, param in named:
        if first.setdefault(param, name) != name:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first[param]))
