"""What the engines built on other libraries (FSDP2, DeepSpeed) have in common: PyTorch's own optimizer, and its state
named as in a checkpoint. Nothing here is used by the native engine.

Invariant: the optimizer's state exists from the start, as zeros, so that what is held, saved and loaded never depends
on whether a step was taken.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload.state import Piece
from parallel.optimizer import moment_kinds
from parallel.options import OptimizerOptions
from parallel.sharded import BUFFER


def single_process_group(device: torch.device) -> None:
    """Make a process group of this process alone, unless there is one already: both libraries need one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def decay_groups(params: Iterable[nn.Parameter], options: OptimizerOptions) -> list[dict[str, Any]]:
    """Parameter groups of those that need a gradient; weight decay for those of two or more dimensions."""
    trained = [param for param in params if param.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    decays = ((matrices, options.weight_decay), (vectors, 0.0))
    return [{"params": group, "weight_decay": decay} for group, decay in decays if group]


def build_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """PyTorch's own of the same name, fused where there is one. groups: with ``params`` and ``weight_decay`` each."""
    if options.name == "adamw":
        betas = (options.beta1, options.beta2)
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)


def start_state(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], options: OptimizerOptions) -> None:
    """Give every parameter its moments, zero, where PyTorch would wait for its first gradient."""
    for param in params:
        state = optimizer.state[param]
        for kind in moment_kinds(options):
            state[kind] = torch.zeros_like(param, requires_grad=False)
        if options.name == "adamw":
            # Of the parameter's device and a tensor: the fused kernel counts in place.
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Continue as if `updates` updates had been made: AdamW corrects the bias of its moments by that count."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def piece(name: str, kind: str, start: int, shape: Sequence[int], tensor: Tensor) -> Piece:
    """The `Piece` that the 1-D `tensor` holds from element `start` on."""
    stop = start + tensor.numel()
    return Piece(name=name, kind=kind, start=start, stop=stop, shape=tuple(shape), tensor=tensor)


def buffer_pieces(model: nn.Module) -> Iterator[Piece]:
    """The model's persistent buffers, the same on every rank; the first one writes them."""
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.numel():
            yield piece(name, BUFFER, 0, buffer.shape, buffer.view(-1))


def size_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
