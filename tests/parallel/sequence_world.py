"""Runs a Llama over parts of a sequence in a world of gloo processes, and beside it the whole sequence on one; rank 0
prints the largest relative difference of loss and gradients, case by case.

    python sequence_world.py WORLD < cases.json

A case: {"heads": 8, "kv": 2, "tokens": 37, "batch": 2, "activations": null or [mode, alpha, or tokens of a tile]}
"""

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from offload.activations.blocks import Activations
from offload.options import ActivationOptions
from parallel.mesh import Mesh
from parallel.sequence import SequenceParallel
from trainer.models.llama import Llama
from trainer.options import LlamaOptions

CPU = torch.device("cpu")


def model_of(case: dict) -> Llama:
    options = LlamaOptions(
        dim=48, ffn_dim=64, num_layers=3, num_heads=case["heads"], num_kv_heads=case["kv"], head_dim=8
    )
    model = Llama(options, vocab_size=32, seq_len=case["tokens"], dtype=torch.float64, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
            setattr(module, name, nn.Parameter(values + (p.ndim == 1)))
    return model


def loss_and_gradients(model: Llama, rows: Tensor, part: slice) -> list[Tensor]:
    tokens, targets = rows[:, :-1][:, part], rows[:, 1:][:, part]
    x = model.embed(tokens)
    for layer in model.layers:
        x = layer(x, model.cos[part], model.sin[part])
    logits = model.head.output(model.head.norm(x))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / rows[:, 1:].numel()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def difference(case: dict) -> float:
    rows = torch.randint(32, (case["batch"], case["tokens"] + 1), generator=torch.Generator().manual_seed(1))
    expected = loss_and_gradients(model_of(case), rows, slice(None))
    sequence = SequenceParallel.of(Mesh({"replica": 1, "sp": dist.get_world_size()}, rank=dist.get_rank()), "sp")
    model = model_of(case)
    activations = nullcontext()
    if case.get("activations"):
        mode, alpha = case["activations"]
        options = {"tile_tokens": alpha} if mode.startswith("stream") else {"alpha": alpha}
        activations = Activations(ActivationOptions(mode=mode, keep_last=1, **options), CPU, poison=True)
        activations.wrap(model.blocks())
    part = sequence.part(case["tokens"])
    with sequence.attention(case["tokens"]):
        found = loss_and_gradients(model, rows, part)
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
    if isinstance(activations, Activations) and alpha != 1:
        # of two blocks (by tiles of all three) the input, and of all tokens what this rank's heads make: not q, k and
        # v, which are sent again
        longest = -(-case["tokens"] // sequence.size)
        numel, blocks, tiles = 48 * longest, 2, 1
        if mode.startswith("stream"):
            blocks, tiles = 3, -(-longest // min(longest, max(2, alpha // case["batch"] - 1)))
        if mode in ("swap", "stream"):
            numel += longest * case["heads"] * (8 + 1)
        assert activations.pools.size_bytes()["host"] <= blocks * (8 * case["batch"] * numel + 3 * 512 * tiles + 4096)
    for tensor in found:
        dist.all_reduce(tensor)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def run(rank: int, world: int, cases: list[dict], store: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    for case in cases:
        try:
            answer: float | str = difference(case)
        except ValueError as error:  # on every rank alike
            answer = str(error)
        if rank == 0:
            print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    world, cases = int(sys.argv[1]), json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        torch.multiprocessing.spawn(run, (world, cases, store), nprocs=world)
