"""A closed engine is forgotten: survivors of a failure build the next one in the same process."""

import gc
import weakref

import torch
from torch import nn

from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard


class Mean(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean()


def test_a_closed_engine_and_its_model_are_freed() -> None:
    model = Mean(nn.Linear(8, 8), nn.Linear(8, 1))
    source = {name: p.detach().clone().flatten() for name, p in model.named_parameters()}
    options = ParallelOptions()
    engine = shard(
        model, Mesh({"worker": 1}), Placement.of(options, 1), units=list(model), optimizer=OptimizerOptions(),
        initial=lambda name, kind, start, stop: source[name][start:stop], options=options, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    engine.forward_backward(torch.ones(2, 8), scale=1.0, first=True, last=True)
    engine.step(1e-3, 1.0)
    engine.close()
    left = [weakref.ref(engine), weakref.ref(model), weakref.ref(engine.units[0].trainable[0].master)]
    del engine, model
    gc.collect()
    assert [ref() for ref in left] == [None] * 3
