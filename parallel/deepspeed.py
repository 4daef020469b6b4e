"""The same job on DeepSpeed's ZeRO, to compare with and to move over from. Needs ``pip install 'atoll[deepspeed]'``.

Owns the model's conversion, the library's configuration and PyTorch's optimizer under it. DeepSpeed is imported when an
engine is made, and not before: the import takes seconds and chooses the accelerator for the process.

Where it differs from the other engines: a parameter that gets no gradient is decayed all the same, since ZeRO updates
flat partitions; and a frozen parameter in bf16 has no fp32 master.

[Note: who holds what] ZeRO-1 and 2 lay a group's parameters end to end and cut the row into one partition per rank: a
parameter's master may begin in one rank's and end in the next one's. ZeRO-3 cuts each parameter into equal ranges, the
last one padded. Both are ranges of the flattened parameter: `Piece`s.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload.state import MASTER, Fill, Movable, Piece, Read, filling
from parallel import foreign
from parallel.cut import lay_out_buffers, wrap_blocks
from parallel.engine import Accept
from parallel.optimizer import moment_kinds
from parallel.options import OptimizerOptions, ParallelOptions

_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_MAX_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own default, far more than a small model has."""


class DeepSpeedEngine:
    """An `Engine` over ``deepspeed.initialize``: placements ``zero1``, ``zero2`` and ``zero3``."""

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
        clip_norm: float | None = None,
    ) -> None:
        """Convert `model` in place for all ranks of the default process group (made for one process if there is none).

        Parameters are on ``meta``; buffers are real. ``zero3`` partitions unit by unit, so that no rank ever holds more
        than one unit whole. `clip_norm` is part of DeepSpeed's configuration: every `step` must pass the same.
        ValueError for a placement that is not ZeRO's, or where DeepSpeed is not installed.
        """
        if options.placement not in _STAGES:
            raise ValueError(
                f"parallel.placement={options.placement} with engine=deepspeed: choose zero1, zero2 or zero3, "
                f"or engine=native"
            )
        self._stage = _STAGES[options.placement]
        self._options, self._clip_norm = optimizer, clip_norm
        deepspeed = _import_deepspeed(device)
        foreign.single_process_group(device)
        self.model = model
        self._numel = {name: param.numel() for name, param in model.named_parameters()}
        self._shape = {name: tuple(param.shape) for name, param in model.named_parameters()}
        wrap_blocks(recompute=recompute, compile=compile)
        lay_out_buffers(model)
        groups = foreign.decay_groups(model.parameters(), optimizer)
        config = _config(self._stage, options, dtype, clip_norm, sum(self._numel.values()))
        for module in [*units, model]:
            _materialize(module, device, dtype)
            if self._stage == 3:
                deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
        inner = foreign.build_optimizer(groups, optimizer)
        self._engine, self._zero, *_ = deepspeed.initialize(model=model, optimizer=inner, config=config)
        self._inner = inner
        foreign.start_state(inner, self._partitions(), optimizer)
        self._updates = 0
        self.load(filling(initial), moments=False)

    @property
    def updates(self) -> int:
        """Updates made so far. Set it after loading moments: AdamW's bias correction depends on it."""
        return self._updates

    @updates.setter
    def updates(self, updates: int) -> None:
        self._updates = updates
        foreign.set_updates(self._inner, updates)

    def forward_backward(self, *inputs: Any, scale: float, first: bool, last: bool) -> Tensor:
        """See `Engine`. ZeRO-1 reduces gradients after the last micro-batch, ZeRO-2 and 3 after each."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self._engine(*inputs)
        # DeepSpeed averages over the ranks; the caller has already divided by their number.
        self._engine.backward(loss * (scale * dist.get_world_size()), scale_wrt_gas=False)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, *inputs: Any) -> Tensor:
        """See `Engine`."""
        output: Tensor = self._engine(*inputs)
        return output

    def expect(self, lr: float) -> None:
        """See `Engine`. Nothing begins before `step`."""

    def step(self, lr: float, clip_norm: float | None, accept: Accept | None = None) -> Tensor:
        """See `Engine`, but DeepSpeed tells its norm only after the update: it cannot be asked whether to `accept`."""
        assert accept is None, "launch.checks refuses train.on_bad_numbers=skip with engine=deepspeed"
        assert clip_norm == self._clip_norm, (
            f"DeepSpeed was configured with clip_norm={self._clip_norm}, not {clip_norm}"
        )
        foreign.set_lr(self._inner, lr)
        self._engine.step()
        self._updates += 1
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)

    def pieces(self) -> Iterator[Piece]:
        """See `Engine`."""
        for name, param in self.model.named_parameters():
            start, state = self._state(name, param)
            for kind, tensor in state.items():
                if tensor.numel():
                    yield foreign.piece(name, kind, start, self._shape[name], tensor.float())
        if dist.get_rank() == 0:
            yield from foreign.buffer_pieces(self.model)

    @torch.no_grad()
    def load(self, fill: Fill, *, moments: bool) -> None:
        """See `Engine`. Set `updates` as well."""
        pieces = []
        for name, param in self.model.named_parameters():
            start, state = self._state(name, param)
            if not param.requires_grad and self._stage < 3:  # whole on every rank, which saves only its part
                start, state = 0, {MASTER: param.view(-1)}
            pieces += [
                foreign.piece(name, kind, start, self._shape[name], tensor)
                for kind, tensor in state.items()
                if moments or kind == MASTER
            ]
        fill(pieces)
        if moments:
            fill(foreign.buffer_pieces(self.model))
        self._refresh_weights()

    def close(self) -> None:
        """See `Engine`. Nothing is held outside the device's memory."""

    def passing_bytes(self) -> dict[str, int]:
        return {}

    def movable(self) -> Movable:
        return Movable(extents=())

    def written_bytes_per_s(self) -> float:
        return 0.0

    def state_bytes(self) -> dict[str, int]:
        """See `Engine`. Gradients as held after a backward; the buckets they pass through are not counted."""
        params: list[Any] = list(self.model.parameters())
        held = [param.ds_tensor if self._stage == 3 else param for param in params]
        trained = [tensor for tensor, param in zip(held, params, strict=True) if param.requires_grad]
        parts = dist.get_world_size() if self._stage == 2 else 1
        moments = [tensor for state in self._inner.state.values() for tensor in state.values() if tensor.ndim]
        return {
            "parameters": foreign.size_bytes(held),
            "gradients": foreign.size_bytes(trained) // parts,
            "master": foreign.size_bytes(self._partitions()),
            "optimizer": foreign.size_bytes(moments),
            "buffers": 0,
        }

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 masters, one a group of parameters; the optimizer's state is kept by them."""
        zero3, zero12 = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"
        return list(getattr(self._zero, zero3 if self._stage == 3 else zero12))

    @torch.no_grad()
    def _state(self, name: str, param: Any) -> tuple[int, dict[str, Tensor]]:
        """Where this rank's range of the parameter starts, and 1-D views of it by kind; see [Note: who holds what]."""
        kinds = moment_kinds(self._options) if param.requires_grad else ()
        if self._stage == 3:
            return self._equal_range(name, param, kinds)
        if not param.requires_grad:
            rank, world = dist.get_rank(), dist.get_world_size()
            low, high = (self._numel[name] * index // world for index in (rank, rank + 1))
            return low, {MASTER: param.view(-1)[low:high]}
        fragment = param._hp_mapping
        if fragment is None:
            return 0, {}
        state = self._inner.state[self._partitions()[fragment.param_group_index]]
        place = fragment.hp_fragment_address
        views = {kind: state[kind].narrow(0, place.start, place.numel) for kind in kinds}
        return fragment.lp_fragment_address.start, {MASTER: fragment.hp_fragment, **views}

    def _equal_range(self, name: str, param: Any, kinds: Sequence[str]) -> tuple[int, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        master = safe_get_local_fp32_param(param) if param.requires_grad else param.ds_tensor
        state = {MASTER: master} | {kind: safe_get_local_optimizer_state(param, kind) for kind in kinds}
        start = min(dist.get_rank() * master.numel(), self._numel[name])
        size = min(master.numel(), self._numel[name] - start)
        return start, {kind: tensor[:size] for kind, tensor in state.items()}

    def _refresh_weights(self) -> None:
        """Make the weights of forward those of the masters."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        from deepspeed.utils import safe_get_local_fp32_param

        params: list[Any] = list(self.model.parameters())
        for param in params:
            if param.requires_grad:
                param.ds_tensor.copy_(safe_get_local_fp32_param(param))
        # Small parameters stay gathered all the time: theirs is the old value still.
        persistent = [param for param in params if param.ds_persist]
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _import_deepspeed(device: torch.device) -> Any:
    # Read at the import: by default DeepSpeed takes a GPU where there is one, whatever the job says, and asks a
    # launcher for the rank on the node. The process group and its ranks are there already.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"engine=deepspeed: {error}; install it with pip install 'atoll[deepspeed]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its calls into torch.distributed say so, at every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    if device.type == "cpu":
        # Otherwise the first run compiles a C++ extension, on every rank at once, which only inference uses.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


def _config(
    stage: int, options: ParallelOptions, dtype: torch.dtype, clip_norm: float | None, numel: int
) -> dict[str, Any]:
    """DeepSpeed's configuration. Accumulation and the learning rate are given with each call instead."""
    bucket = min(numel, _MAX_BUCKET_ELEMENTS)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "gradient_clipping": clip_norm or 0.0,
        "communication_data_type": options.reduce_dtype,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Would replace torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


@torch.no_grad()
def _materialize(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give the parameters that are still on ``meta`` memory, in place, so that ties stay; the values come later."""
    for param in module.parameters():
        if param.is_meta:
            real = nn.Parameter(torch.zeros(param.shape, dtype=dtype, device=device), param.requires_grad)
            torch.utils.swap_tensors(param, real)
