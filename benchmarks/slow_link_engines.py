"""The sides of the slow-link benchmark: the jobs, and what each engine does for one step of them on gloo.

All sides train the same model from the same weights on the same micro-batches with fused AdamW and no clipping. Ours
are called ``atoll-<placement>…``; every other one is set up as well as its library allows on CPU, and says below how.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, foreign, shard
from parallel.planning.traffic import Traffic
from parallel.planning.workload import UnitCost, Workload, aligned
from parallel.transport import Transport
from trainer.models import build_model
from trainer.options import LlamaOptions

CPU = torch.device("cpu")
OPTIMIZER = OptimizerOptions(lr=1e-3)
EXACT, ROUNDED, BF16, QUANTIZED = 1e-5, 5e-3, 2e-2, 5e-2
"""How far the losses of the first steps may be from a plain loop's, relative. Rounded: gradients are fp32 sums in
another order, 5e-7 from the plain loop's, and of one that is next to nothing AdamW makes a whole step."""

# ---------------------------------------------------------------------------------------------------- the jobs


class Linears(nn.Module):
    """Eight linear layers of 768 and the mean square of what comes out: all weights, hardly any compute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(768, 768, bias=False) for _ in range(8)])

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        x = self.layers(x.to(first.weight.dtype))
        loss: Tensor = x.float().square().mean()
        return loss


LLAMA = LlamaOptions(dim=320, ffn_dim=896, num_layers=8, num_heads=10, num_kv_heads=5, head_dim=32)
SEQ_LEN, VOCAB = 64, 256


def build_linear() -> nn.Module:
    return Linears()


def build_llama() -> nn.Module:
    model = build_model(LLAMA, vocab_size=VOCAB, seq_len=SEQ_LEN, dtype=torch.float32, device=CPU)
    read = model.initial(0, CPU)
    for name, param in model.named_parameters():
        real = nn.Parameter(read(name, "master", 0, param.numel()).view(param.shape))
        torch.utils.swap_tensors(param, real)
    return model


def linear_batch(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(8, 768, generator=generator),)


def llama_batch(generator: torch.Generator) -> tuple[Tensor, ...]:
    rows = torch.randint(VOCAB, (1, SEQ_LEN + 1), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def linear_work(micro_batches: int, compute_bytes: int, reduce_bytes: int) -> Workload:
    size = aligned(768 * 768)
    first = UnitCost(name="first", matrices=size, gathers_backward=False)  # its input needs no gradient
    return Workload(
        units=(first, dataclasses.replace(first, name="layer", count=7, gathers_backward=True)), tokens=8,
        micro_batches=micro_batches, compute_bytes=compute_bytes, reduce_bytes=reduce_bytes, num_parameters=8,
    )  # fmt: skip


def llama_work(micro_batches: int, compute_bytes: int, reduce_bytes: int) -> Workload:
    model = build_model(LLAMA, vocab_size=VOCAB, seq_len=SEQ_LEN, dtype=torch.float32, device=torch.device("meta"))
    return Workload.read(
        model, seq_len=SEQ_LEN, micro_batch_size=1, micro_batches=micro_batches, compute_bytes=compute_bytes,
        reduce_bytes=reduce_bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    build: Callable[[], nn.Module]
    """The model with its first weights, the same on every rank."""
    batch: Callable[[torch.Generator], tuple[Tensor, ...]]
    work: Callable[[int, int, int], Workload]
    """What the cost model is told of it: from the micro-batches and the bytes in which it computes and reduces."""

    def micro_batch(self, step: int, rank: int, index: int) -> tuple[Tensor, ...]:
        return self.batch(torch.Generator().manual_seed((step * 64 + rank) * 64 + index))


JOBS = {"linear": Job(build_linear, linear_batch, linear_work), "llama": Job(build_llama, llama_batch, llama_work)}

# --------------------------------------------------------------------------------------------------- the sides


class Side(Protocol):
    """One engine with its model. All calls are collective."""

    def micro_batch(self, inputs: tuple[Tensor, ...], *, index: int, num: int) -> Tensor:
        """Forward and backward of one of a step's `num` micro-batches; returns its loss."""

    def update(self) -> None:
        """The optimizer's step."""

    def settle(self) -> None:
        """Wait for what the last step still has under way."""

    def optimizer_bytes(self) -> int:
        """Of the optimizer's state that this rank holds, without master weights."""


@runtime_checkable
class HasUnits(Protocol):
    def units(self) -> list[nn.Module]: ...


def units_of(model: nn.Module) -> list[nn.Module]:
    """What an engine gathers, computes and releases together."""
    assert isinstance(model, HasUnits)
    return model.units()


class Atoll:
    def __init__(
        self, model: nn.Module, levels: Mapping[str, int], *, overlap: bool, dtype: torch.dtype, **options: Any
    ) -> None:
        parallel = ParallelOptions(levels=dict(levels), overlap=overlap, **options)
        self._world = dist.get_world_size()
        mesh = Mesh.of(parallel.levels, rank=dist.get_rank(), world=self._world)
        weights = {name: param.detach().clone().flatten() for name, param in model.named_parameters()}
        self.engine = shard(
            model, mesh, Placement.of(parallel, mesh.num_levels),
            units=units_of(model), initial=lambda name, kind, start, stop: weights[name][start:stop],
            optimizer=OPTIMIZER, options=parallel, dtype=dtype, device=CPU,
        )  # fmt: skip

    def micro_batch(self, inputs: tuple[Tensor, ...], *, index: int, num: int) -> Tensor:
        scale, first, last = 1 / (self._world * num), index == 0, index == num - 1
        return self.engine.forward_backward(*inputs, scale=scale, first=first, last=last)

    def update(self) -> None:
        self.engine.step(OPTIMIZER.lr, None)

    def settle(self) -> None:
        for flat in self.engine._trainable:
            self.engine.weights.finish_update(flat)

    def optimizer_bytes(self) -> int:
        return self.engine.state_bytes()["optimizer"]


class _Foreign:
    """What the baselines share: PyTorch's optimizer, and nothing left under way after a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def set_optimizer(self, params: Sequence[nn.Parameter]) -> None:
        self.optimizer = foreign.build_optimizer(foreign.decay_groups(params, OPTIMIZER), OPTIMIZER)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settle(self) -> None:
        pass

    def optimizer_bytes(self) -> int:
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if t.ndim]
        return foreign.size_bytes(t.to_local() if isinstance(t, DTensor) else t for t in tensors)


class _AllToAll:
    """FSDP2's reduce-scatter by an all-to-all and a local sum: gloo's own moves as much as an all-reduce."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), 0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


class FSDP2(_Foreign):
    """``fully_shard`` on every unit and the root, over all ranks or (``shard_ranks``) replicated groups of ranks.

    repaired: all-to-all reduce-scatter, explicit prefetch forward and backward, asynchronous unshard.
    keep: weights stay gathered and gradients unreduced until the last micro-batch, as in ZeRO-2 with ``no_sync``.
    """

    def __init__(
        self, model: nn.Module, *, repaired: bool = True, keep: bool = False, shard_ranks: int = 0,
        reshard: bool | int = True, compute: torch.dtype | None = None, reduce: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        world, units = dist.get_world_size(), units_of(model)
        self._replicated, self._keep = bool(shard_ranks), keep
        if shard_ranks:
            mesh = init_device_mesh("cpu", (world // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh("cpu", (world,))
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False if keep else reshard)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self._root, *sharded = cast(list[FSDPModule], [model, *units])
        if repaired:
            self._root._set_unshard_async_op(True)
            scatter: Any = _AllToAll()  # has what the base class asks for, which is private
            for module in sharded:
                module.set_custom_reduce_scatter(scatter)
            for before, after in zip(sharded, sharded[1:], strict=False):
                before.set_modules_to_forward_prefetch([after])
                after.set_modules_to_backward_prefetch([before])
        self.model = model
        self.set_optimizer(list(model.parameters()))

    def micro_batch(self, inputs: tuple[Tensor, ...], *, index: int, num: int) -> Tensor:
        last = index == num - 1
        if self._replicated:
            self._root.set_requires_all_reduce(last)
        if self._keep:
            self._root.set_requires_gradient_sync(last)
            self._root.set_reshard_after_backward(last)
        loss: Tensor = self.model(*inputs)
        (loss / num).backward()
        return loss.detach()


def _bf16_hook(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What PyTorch's ``bf16_compress_hook`` does; DDP refuses that one by name where there is no NCCL."""
    buffer, world = bucket.buffer(), dist.get_world_size()
    work = dist.all_reduce(buffer.to(torch.bfloat16).div_(world), async_op=True)
    done: torch.futures.Future[Tensor] = work.get_future().then(lambda future: buffer.copy_(future.value()[0]))
    return done


class DDP(_Foreign):
    """Buckets of 4 MB (the default of 25 holds most of these models), gradients as views of them, ``no_sync``."""

    model: DistributedDataParallel

    def __init__(self, model: nn.Module, *, bf16: bool = False) -> None:
        self.model = DistributedDataParallel(model, bucket_cap_mb=4, gradient_as_bucket_view=True)
        if bf16:
            self.model.register_comm_hook(None, _bf16_hook)
        self.set_optimizer(list(model.parameters()))

    def micro_batch(self, inputs: tuple[Tensor, ...], *, index: int, num: int) -> Tensor:
        with contextlib.nullcontext() if index == num - 1 else self.model.no_sync():
            loss: Tensor = self.model(*inputs)
            (loss / num).backward()
        return loss.detach()


class DeepSpeed(_Foreign):
    """ZeRO-3; with ``hpz_ranks`` a second copy of the weights in every node (ZeRO++, arXiv 2306.10209)."""

    def __init__(self, model: nn.Module, *, hpz_ranks: int = 1) -> None:
        from parallel.deepspeed import _import_deepspeed

        deepspeed = _import_deepspeed(CPU)
        numel = sum(param.numel() for param in model.parameters())
        self.set_optimizer(list(model.parameters()))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # each step says itself which micro-batch is the last
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "contiguous_gradients": True,
                "reduce_bucket_size": numel,
                "stage3_prefetch_bucket_size": numel,
                "stage3_max_live_parameters": numel,
                "stage3_max_reuse_distance": 0,  # otherwise so small a model is never given back: not ZeRO-3
                "memory_efficient_linear": False,
                "zero_hpz_partition_size": hpz_ranks,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)

    def micro_batch(self, inputs: tuple[Tensor, ...], *, index: int, num: int) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(index == num - 1)
        loss: Tensor = self.engine(*inputs)
        self.engine.backward(loss / num, scale_wrt_gas=False)
        return loss.detach()

    def update(self) -> None:
        self.engine.step()


# ------------------------------------------------------------------------------------------------ the selection


@dataclass(frozen=True)
class Engine:
    build: Callable[[nn.Module, Mapping[str, int], bool], Side]
    """From the model, the levels and whether to overlap."""
    tolerance: float = EXACT
    overlaps: tuple[bool, ...] = (True,)
    min_levels: int = 2
    own_world: bool = False
    """Keeps state of its own in the process: gets ranks that no other engine has used."""
    options: tuple[str, ...] = ()
    """Of `ParallelOptions`, that it sets."""
    sends: Callable[[Job, Mapping[str, int], int], dict[str, float]] | None = None
    """Of ours: the bytes that a rank sends over each level in a step of so many micro-batches, by the cost model."""

    def missing(self) -> list[str]:
        """The options that this version does not have."""
        known = {field.name for field in dataclasses.fields(ParallelOptions)}
        return [name for name in self.options if name not in known]


def _atoll(
    placement: str,
    tolerance: float = EXACT,
    dtype: torch.dtype = torch.float32,
    *,
    min_levels: int = 2,
    **options: Any,
) -> Engine:
    def build(model: nn.Module, levels: Mapping[str, int], overlap: bool) -> Side:
        return Atoll(model, levels, overlap=overlap, dtype=dtype, placement=placement, **options)

    def sends(job: Job, levels: Mapping[str, int], micro_batches: int) -> dict[str, float]:
        parallel = ParallelOptions(placement=placement, **options)
        mesh = Mesh(dict(levels))
        placed = Placement.of(parallel, mesh.num_levels)
        work = job.work(micro_batches, dtype.itemsize, 2 if parallel.reduce_dtype == "bf16" else 4)
        phases = Traffic(work, mesh, placed, Transport.of(parallel, mesh, placed), gloo=True).sent_bytes()
        return dict(zip(levels, map(sum, zip(*phases.values(), strict=True)), strict=True))

    return Engine(build, tolerance, (True, False), min_levels, options=("overlap", *options), sends=sends)


def _fsdp2(tolerance: float = EXACT, **options: Any) -> Engine:
    return Engine(lambda model, *_: FSDP2(model, **options), tolerance)


def _hsdp(tolerance: float = EXACT, *, outermost: bool = False, **options: Any) -> Engine:
    """Sharded inside a node, or (`outermost`) over everything inside the outermost level."""

    def build(model: nn.Module, levels: Mapping[str, int], _: bool) -> Side:
        sizes = list(levels.values())
        ranks = dist.get_world_size() // sizes[0] if outermost else sizes[-1]
        return FSDP2(model, shard_ranks=ranks, **options)

    return Engine(build, tolerance, min_levels=3 if outermost else 2)


def _innermost(levels: Mapping[str, int]) -> int:
    return list(levels.values())[-1]


_BF16: dict[str, Any] = {"compute": torch.bfloat16, "reduce": torch.bfloat16}

ENGINES: dict[str, Engine] = {
    "atoll-zero3": _atoll("zero3"),
    "atoll-hsdp": _atoll("hsdp"),
    "atoll-hfsdp": _atoll("hfsdp"),
    "atoll-topo": _atoll("topo"),
    "atoll-hfsdp-bf16": _atoll("hfsdp", BF16, torch.bfloat16, reduce_dtype="bf16"),
    "atoll-hfsdp-int": _atoll("hfsdp", QUANTIZED, quantize="outer"),
    "atoll-topo-int": _atoll("topo", QUANTIZED, quantize="outer"),
    "atoll-topo-int-bf16": _atoll("topo", QUANTIZED, torch.bfloat16, quantize="outer", reduce_dtype="bf16"),
    # inside the node what HSDP does, over both slow levels the optimizer's states, quantized
    "atoll-113-int-bf16": _atoll(
        "free",
        QUANTIZED,
        torch.bfloat16,
        min_levels=3,
        params=1,
        grads=1,
        optim=3,
        quantize="outer",
        reduce_dtype="bf16",
        weights_format={"node": "int8"},
        grads_format={"node": "int4"},
    ),
    "atoll-topo-int-all": _atoll("topo", QUANTIZED, quantize="all"),
    "atoll-zero3-int-all": _atoll("zero3", QUANTIZED, quantize="all"),
    "fsdp2": _fsdp2(repaired=False),
    "fsdp2-repaired": _fsdp2(),
    "fsdp2-reshard": Engine(lambda model, levels, _: FSDP2(model, reshard=_innermost(levels))),
    "fsdp2-keep": _fsdp2(keep=True),
    "hsdp": _hsdp(),
    "hsdp-bf16": _hsdp(BF16, **_BF16),
    "hsdp-bf16-reduce": _hsdp(BF16, reduce=torch.bfloat16),
    "hsdp-outer": _hsdp(outermost=True),
    "hsdp-outer-bf16-reduce": _hsdp(BF16, outermost=True, reduce=torch.bfloat16),
    "ddp": Engine(lambda model, *_: DDP(model)),
    "ddp-bf16": Engine(lambda model, *_: DDP(model, bf16=True), BF16),
    "deepspeed": Engine(lambda model, *_: DeepSpeed(model), tolerance=ROUNDED, own_world=True),
    "deepspeed-hpz": Engine(
        lambda model, levels, _: DeepSpeed(model, hpz_ranks=_innermost(levels)), tolerance=ROUNDED, own_world=True
    ),
}

warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
