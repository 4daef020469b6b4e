"""AdamW on host memory, in one pass: 28 bytes a parameter and no intermediate copies.

    bf16 gradient 2, fp32 master 4 + 4, exp_avg 4 + 4, exp_avg_sq 4 + 4 (read + written), bf16 weight 2

Invariants. The result of an element depends on that element and the hyperparameters alone, bit for bit: not on the
number of threads, alignment, where a range is cut, in place or out of place, the width of the processor's vectors, or
whether the C code runs or torch. That holds because only operations that IEEE 754 rounds correctly are used, unfused,
in one order (`native/lanes.h`). So a unit may be updated in pieces, on another machine after a crash, or a second time
from the version before, and gives the same bits.

[Note: streaming stores] An ordinary store to a line that is not in cache reads the line first: an update into other
memory (ping-pong) would move 40 bytes a parameter instead of 28. Streaming stores write whole lines past the caches.
They are used where a destination is not also a source and begins a cache line (64 bytes): for all of an out-of-place
update, and for the weight also in place.

[Note: the weight alone] The new weight can be made without the new states, which are left to a second pass: 16 bytes a
parameter now (bf16 gradient 2, master 4, exp_avg 4, exp_avg_sq 4, bf16 weight 2) and 26 later, of the same bits.

Threads: see `offload/hostpool.py`. Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; the order of
operations is that of `parallel/kernels.py`, with 1 - beta taken in double precision as torch does.
"""

import ctypes
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from offload.hostpool import HostPool

State = tuple[Tensor, Tensor, Tensor]
"""master, exp_avg, exp_avg_sq: 1-D fp32, of the same length."""

_SLICE = 1 << 18  # elements at a time where torch does the work: what it allocates stays in cache
_SUM_SLICE = 1 << 22  # the same for sums: 1024 additions each, which must be long
_SUM_BLOCK, _SUM_LANES = 16384, 16  # as in native/kernels.c
_TYPES = {torch.bfloat16: 1, torch.float32: 2}  # as in native/kernels.c; 0 is none


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("master", "exp_avg", "exp_avg_sq", "grad")),
        *((name, ctypes.c_void_p) for name in ("new_master", "new_exp_avg", "new_exp_avg_sq", "weight")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "rest1", "beta2", "rest2", "eps", "decay", "step_size", "root")),
        *((name, ctypes.c_int32) for name in ("grad_type", "weight_type", "stream_state", "weight_alone")),
    ]


class _Addition(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_void_p),
        ("addend", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


class _Squares(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


class _Copying(ctypes.Structure):
    _fields_ = [("into", ctypes.c_void_p), ("source", ctypes.c_void_p), ("size_bytes", ctypes.c_int64)]


def adamw(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    *,
    scale: float = 1.0,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    updates: int,
    out: State | None = None,
    weight_alone: bool = False,
    pool: HostPool,
) -> None:
    """One AdamW update of 1-D CPU tensors of n elements.

    master, exp_avg, exp_avg_sq: fp32. grad: bf16 or fp32, is multiplied by `scale` first. weight: None, or where the
    new weights go, bf16 (rounded to nearest even) or fp32; may be `grad` itself. updates: how many there were, this
    one included. out: where the new master and moments go; None: in place. weight_alone: they go nowhere, only
    `weight` is written, which is not `grad` then. A non-finite gradient is not looked for: that is what
    `sum_of_squares` is for.
    Raises ValueError for a tensor of another kind, or where `out` overlaps in part with what is read.
    """
    state = (master, exp_avg, exp_avg_sq)
    new = state if out is None else out
    _check(master.numel(), {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, (torch.float32,))
    _check(master.numel(), dict(zip(("out[0]", "out[1]", "out[2]"), new, strict=True)), (torch.float32,))
    _check(master.numel(), {"grad": grad} if weight is None else {"grad": grad, "weight": weight}, tuple(_TYPES))
    written = [*(() if weight_alone else new), *(() if weight is None else (weight,))]
    _check_overlap([*state, grad], written, same_allowed=not weight_alone)
    if weight_alone and (weight is None or out is not None):
        raise ValueError("weight_alone writes `weight` and no states: give a weight, and no `out`")
    if updates < 1:
        raise ValueError(f"updates={updates}: the first update is number 1")
    values = (scale, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**updates))
    root = math.sqrt(1 - beta2**updates)
    if not pool.native:
        _torch_adamw(state, grad, weight, () if weight_alone else new, *map(_as_fp32, (*values, root)))
        return
    pointers = [t.data_ptr() for t in (*state, grad, *new)] + [None if weight is None else weight.data_ptr()]
    weight_type = 0 if weight is None else _TYPES[weight.dtype]
    stream = all(target.data_ptr() != source.data_ptr() for target, source in zip(new, state, strict=True))
    types = _TYPES[grad.dtype], weight_type
    arguments = _Update(*pointers, master.numel(), *values, root, *types, stream, weight_alone)
    pool.call("adamw", arguments)


def accumulate(total: Tensor, addend: Tensor, *, pool: HostPool) -> None:
    """``total += addend``: 1-D CPU tensors of n elements, fp32 and fp32 or bf16. One rounding an element."""
    _check(total.numel(), {"total": total}, (torch.float32,))
    _check(total.numel(), {"addend": addend}, tuple(_TYPES))
    _check_overlap([total, addend], [total])
    if pool.native:
        pool.call("accumulate", _Addition(total.data_ptr(), addend.data_ptr(), total.numel(), _TYPES[addend.dtype]))
    else:
        total += addend


def sum_of_squares(values: Tensor, *, pool: HostPool) -> float:
    """In fp64, of a 1-D CPU tensor, fp32 or bf16; inf or NaN if and only if some element is not finite.

    Blocks of 16384 elements, counted from the start of `values`, are each summed by a fixed tree; their sums are
    added without any rounding but the last. So the result depends on the values and their order alone.
    """
    _check(values.numel(), {"values": values}, tuple(_TYPES))
    sums = torch.empty(-(-values.numel() // _SUM_BLOCK), dtype=torch.float64)
    if pool.native:
        pool.call("squares", _Squares(values.data_ptr(), sums.data_ptr(), values.numel(), _TYPES[values.dtype]))
    else:
        sums = torch.cat([_torch_squares(piece) for piece in values.split(_SUM_SLICE)]) if len(sums) else sums
    return math.fsum(sums.tolist())


def copy(into: Tensor, source: Tensor, *, pool: HostPool) -> None:
    """Copy contiguous CPU tensors of the same size in bytes, apart from each other, past the caches."""
    if into.nbytes != source.nbytes or not (into.is_contiguous() and source.is_contiguous()):
        raise ValueError(
            f"into has {into.nbytes} bytes, source {source.nbytes}: both must be contiguous and as large as each other"
        )
    _check_overlap([source], [into], same_allowed=False)
    if pool.native:
        pool.call("copy", _Copying(into.data_ptr(), source.data_ptr(), into.nbytes))
    elif into.numel():
        into.view(-1).view(torch.uint8).copy_(source.view(-1).view(torch.uint8))


def _torch_adamw(
    state: State, grad: Tensor, weight: Tensor | None, new: State | tuple[()],
    scale: float, rest1: float, beta2: float, rest2: float, eps: float, decay: float, step_size: float, root: float,
) -> None:  # fmt: skip
    """The C code's operations, one by one: no `lerp`, `addcmul` or `alpha`, which torch may fuse."""
    for part in _slices(state[0].numel()):
        scaled = grad[part].float() * scale
        exp_avg = state[1][part] + (scaled - state[1][part]) * rest1
        exp_avg_sq = state[2][part] * beta2 + scaled * rest2 * scaled
        square_root = torch.from_numpy(np.sqrt(exp_avg_sq.numpy()))  # torch's, from MKL, is not always the nearest
        denominator = square_root / torch.tensor(root) + eps  # by a number, torch might multiply by its inverse
        master = state[0][part] * decay - exp_avg / denominator * step_size
        if new:
            for target, values in zip(new, (master, exp_avg, exp_avg_sq), strict=True):
                target[part] = values
        if weight is not None:
            weight[part] = master


def _torch_squares(values: Tensor) -> Tensor:
    """One sum a block by the tree of the C code. values: 1-D; only its last block may be short."""
    length = -(-values.numel() // _SUM_BLOCK) * _SUM_BLOCK
    padded = torch.zeros(length, dtype=torch.float64)
    padded[: values.numel()] = values
    padded *= padded
    rows = padded.view(-1, _SUM_BLOCK // _SUM_LANES, _SUM_LANES)
    sums = torch.zeros(rows.shape[0], _SUM_LANES, dtype=torch.float64)
    for row in rows.unbind(1):
        sums += row
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def _slices(numel: int) -> Iterator[slice]:
    return (slice(start, min(start + _SLICE, numel)) for start in range(0, numel, _SLICE))


def _as_fp32(value: float) -> float:
    return ctypes.c_float(value).value


def _check(numel: int, tensors: dict[str, Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    for name, tensor in tensors.items():
        cpu = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dim() == 1
        if not cpu or tensor.dtype not in dtypes or tensor.numel() != numel:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}; must be "
                f"[{numel}], contiguous, on the CPU, {' or '.join(map(str, dtypes))}"
            )


def _check_overlap(read: list[Tensor], written: list[Tensor], same_allowed: bool = True) -> None:
    """What is written may be exactly what is read, or apart from it and from all else that is written."""
    for i, target in enumerate(written):
        start, stop = target.data_ptr(), target.data_ptr() + target.nbytes
        for other in (*read, *written[:i]):
            apart = stop <= other.data_ptr() or other.data_ptr() + other.nbytes <= start
            same = same_allowed and other.data_ptr() == start and other.nbytes == target.nbytes
            if not apart and not (same and any(other is r for r in read)):
                raise ValueError("what is written overlaps in part with what is read, or twice with itself")
