"""A closed engine is forgotten: survivors of a failure build the next one in the same process."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from offload.options import ActivationOptions, OffloadOptions
from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard
from parallel.engine import Engine


class Mean(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean()


def build(model: Mean, mesh: Mesh, options: ParallelOptions, activations: str = "keep") -> Engine:
    source = {name: p.detach().clone().flatten() for name, p in model.named_parameters()}
    return shard(
        model, mesh, Placement.of(options, 1), units=list(model), optimizer=OptimizerOptions(),
        initial=lambda name, kind, start, stop: source[name][start:stop], options=options, dtype=torch.float32,
        device=torch.device("cpu"), blocks=list(model),
        offload=OffloadOptions(activations=ActivationOptions(mode=activations)),
    )  # fmt: skip


def test_a_closed_engine_and_its_model_are_freed() -> None:
    model = Mean(nn.Linear(8, 8), nn.Linear(8, 1))
    engine = build(model, Mesh({"worker": 1}), ParallelOptions())
    engine.forward_backward(torch.ones(2, 8), scale=1.0, first=True, last=True)
    engine.step(1e-3, 1.0)
    engine.close()
    left = [weakref.ref(engine), weakref.ref(model), weakref.ref(engine.units[0].trainable[0].master)]
    del engine, model
    gc.collect()
    assert [ref() for ref in left] == [None] * 3


@pytest.mark.parametrize("at", ["the first weights", "activations"])
def test_an_engine_that_cannot_be_made_leaves_no_threads(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a peer dies meanwhile, which ranks find in the first collective after."""

    def fails(*args: object, **more: object) -> torch.Tensor:
        raise RuntimeError("a peer has died")

    if at == "activations":
        monkeypatch.setattr("parallel.sharded.Activations", fails)
    model = Mean(nn.Linear(8, 8), nn.Linear(8, 1))
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="a peer has died"):
        shard(
            model, Mesh({"worker": 1}), Placement(0, 0, 0), units=list(model), optimizer=OptimizerOptions(),
            initial=fails, options=ParallelOptions(), dtype=torch.float32, device=torch.device("cpu"),
            offload=OffloadOptions(states="host"),
        )  # fmt: skip
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("where", "activations"),
    [
        ("backward", "swap"),
        *(
            pytest.param(where, activations, marks=pytest.mark.slow)
            for where, activations in (("first", "keep"), ("last", "keep"), ("backward", "keep"), ("last", "swap"))
        ),
    ],
)
def test_a_closed_engine_is_freed_where_a_peer_has_died_in_a_step(tmp_path: Path, where: str, activations: str) -> None:
    """The other one waits for weights then, with more or less of a graph made, or in its backward."""
    code = "from tests.parallel.test_engine_close import main; main()"
    command = [sys.executable, "-c", code, str(tmp_path), where, activations]
    world = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert world.stdout.split() == ["raised", "freed"], world.stderr


def main() -> None:
    left: list[weakref.ref[object]] = []
    rank = int(os.fork() == 0)
    try:
        train(rank, left)
    except RuntimeError:
        print("raised")
    dist.destroy_process_group()
    gc.collect()
    kept = [type(ref()) for ref in left if ref() is not None]
    print("freed" if left and not kept else kept)


def train(rank: int, left: "list[weakref.ref[object]]") -> None:
    store = dist.FileStore(f"{sys.argv[1]}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    model = Mean(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    engine = build(model, Mesh.of({}, rank=rank, world=2), ParallelOptions(), sys.argv[3])
    masters = [unit.trainable[0].master for unit in engine.units]
    left += map(weakref.ref, (engine, engine.activations, model, *masters))
    del masters
    if rank == 1 and sys.argv[2] == "backward":
        model[2].register_full_backward_hook(die)
    elif rank == 1:
        model[0 if sys.argv[2] == "first" else 4].register_forward_pre_hook(die, prepend=True)
    for block in model:
        block.register_forward_hook(lambda _, __, out: left.append(weakref.ref(out)))
    try:
        engine.forward_backward(torch.ones(2, 8), scale=1.0, first=True, last=True)
        engine.step(1e-3, 1.0)
    finally:
        left += engine.activations._tapes
        engine.close()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
