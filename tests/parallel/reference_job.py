"""A small job with everything that is awkward to shard, the same job in plain PyTorch, and workers for engines.

Not a test itself: the tests of the engines built on FSDP2 and DeepSpeed share it.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from offload.state import MASTER, Piece, Read
from parallel import foreign
from parallel.options import OptimizerOptions

VOCAB, DIM, ACCUMULATION, SEQUENCES = 11, 6, 2, 3
ADAMW = OptimizerOptions(lr=1e-2, weight_decay=0.1)
CLIP = 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 7, bias=False)
        self.down = nn.Linear(7, DIM)
        self.row = nn.Parameter(torch.empty(1, DIM))
        self.cube = nn.Parameter(torch.empty(5, 3, 2))
        self.frozen = nn.Parameter(torch.empty(DIM), requires_grad=False)
        self.unused = nn.Parameter(torch.empty(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * self.frozen + self.row * self.cube.square().sum()


class Awkward(nn.Module):
    """Tied weights, rows that do not divide, a single row, three dimensions, frozen and unused parameters, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.empty(DIM))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens) + self.shift.to(self.embed.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())

    def units(self) -> list[nn.Module]:
        return [self.embed, *self.blocks, self.head]


def awkward_on_meta() -> Awkward:
    with torch.device("meta"):
        model = Awkward()
    model.shift = torch.linspace(-0.1, 0.1, DIM)
    return model


def initial(name: str, kind: str, start: int, stop: int) -> Tensor:
    """The first weights: a function of the name alone, whatever range is asked for."""
    if kind != MASTER:
        raise KeyError(kind)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(VOCAB * DIM, generator=generator)[start:stop] * 0.3


def batch(step: int, index: int) -> tuple[Tensor, Tensor]:
    """Micro-batch `index` of all the ranks' together."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(VOCAB, (SEQUENCES, 5), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def train_plainly(world: int, steps: int, options: OptimizerOptions, *, decay_unused: bool = False) -> dict[str, Any]:
    """The job in one process in plain PyTorch: losses, gradient norms and the last weights."""
    model = Awkward()
    model.shift.copy_(torch.linspace(-0.1, 0.1, DIM))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.view(-1).copy_(initial(name, MASTER, 0, param.numel()))
    optimizer = foreign.build_optimizer(foreign.decay_groups(model.parameters(), options), options)
    trained = [param for param in model.parameters() if param.requires_grad]
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        micro_losses = [model(*batch(step, index)) for index in range(world * ACCUMULATION)]
        loss = torch.stack(micro_losses).mean()
        loss.backward()
        if decay_unused:
            for param in trained:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        norms.append(nn.utils.clip_grad_norm_(trained, CLIP))
        optimizer.step()
        losses.append(loss.detach())
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "weights": weights}


def train(engine: Any, steps: Iterable[int], accept: Callable[[Tensor], bool] | None = None) -> dict[str, Tensor]:
    """The job on this rank of an engine: the global mean losses and the gradient norms."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses, norms = [], []
    for step in steps:
        loss = torch.zeros(())
        for micro in range(ACCUMULATION):
            inputs = batch(step, micro * world + rank)
            first, last = micro == 0, micro == ACCUMULATION - 1
            loss += engine.forward_backward(*inputs, scale=1 / (world * ACCUMULATION), first=first, last=last)
        engine.evaluate(*batch(step, 0))
        norms.append(engine.step(ADAMW.lr, CLIP, accept).float())
        dist.all_reduce(loss)
        losses.append(loss / (world * ACCUMULATION))
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)}


def assemble(pieces: list[Piece]) -> dict[tuple[str, str], Tensor]:
    """Whole flattened tensors by name and kind; asserts that each element was given exactly once."""
    whole = {(piece.name, piece.kind): torch.zeros(piece.shape).flatten() for piece in pieces}
    given = {key: torch.zeros_like(tensor) for key, tensor in whole.items()}
    for piece in pieces:
        whole[piece.name, piece.kind][piece.start : piece.stop] = piece.tensor
        given[piece.name, piece.kind][piece.start : piece.stop] += 1
    assert all(bool((count == 1).all()) for count in given.values())
    return whole


def reader(whole: dict[tuple[str, str], Tensor]) -> Read:
    return lambda name, kind, start, stop: whole[name, kind][start:stop]


def gather_state(engine: Any) -> dict[tuple[str, str], Tensor]:
    """The whole state, on every rank."""
    mine = [Piece(**{**vars(piece), "tensor": piece.tensor.clone()}) for piece in engine.pieces()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return assemble([piece for pieces in everyone for piece in pieces])


def spawn(worker: Callable[..., None], world: int, folder: Path, *args: Any) -> list[Any]:
    """Run ``worker(rank, *args) -> result`` in `world` processes joined by gloo; returns the results by rank."""
    mp.spawn(_run, args=(worker, world, str(folder), args), nprocs=world)
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, worker: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(worker(rank, *args), f"{folder}/result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
